"""What `make bench` measures, and how it predicts the time of a case."""

import itertools

import pytest
import torch

from benchmarks.blocks import BLOCKS
from benchmarks.costs import bench_blocks
from benchmarks.measure import MODES


def test_bench_covers_every_block_and_size():
    cases = bench_blocks.cases(quick=False)
    on_cpu = {(c.name, c.mode, c.channels, c.side, c.batch) for c in cases if c.device == "cpu"}
    names = set(itertools.product(BLOCKS, MODES)) - {('EMAUnit, gradient="all"', "forward")}
    sizes = set(itertools.product((256, 512), (33, 65, 97, 129), (1, 4)))
    assert on_cpu == {(*name, *size) for name in names for size in sizes}


def test_bench_foretells_time_from_the_size_before():
    small, large = (bench_blocks.Case("CAM", 16, side, 1, "forward", torch.float32, "cpu") for side in (8, 16))
    budget = bench_blocks.Budget(100)
    budget.measured(small, 0.5)
    assert budget.foretold(large) == pytest.approx(2.0)
    assert 99 < budget.left() <= 100
