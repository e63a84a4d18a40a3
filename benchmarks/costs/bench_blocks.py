"""`make bench`: every block × size × {eval forward, training step}, by pytest-benchmark.

pytest does not collect this file by itself, so `make test` stays fast.
"""

from __future__ import annotations

import time
from functools import cache
from typing import NamedTuple

import pytest
import torch

from benchmarks import measure
from benchmarks.blocks import BLOCKS
from benchmarks.costs.sizes import FULL, QUICK
from benchmarks.measure import MODES, Mode

GIGA = 1e9


class Case(NamedTuple):
    name: str
    channels: int
    side: int
    batch: int
    mode: Mode
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.batch}x{self.channels}x{self.side}x{self.side}-{self.mode}-{dtype}-{self.device}-{self.name}"

    @property
    def macs(self) -> int:
        return self.batch * BLOCKS[self.name].macs_on(self.device, self.channels, self.side, self.side)


def cases(quick: bool) -> list[Case]:
    """All of them, small sizes first: from these the time of the large ones is predicted."""
    sizes = QUICK if quick else FULL
    kinds = [("cpu", torch.float32)]
    if torch.cuda.is_available():
        kinds = [("cuda", torch.float32), ("cuda", torch.bfloat16), *kinds]
    return [
        Case(name, channels, side, batch, mode, dtype, device)
        for device, dtype in kinds
        for side in sizes.sides
        for batch in sizes.batches
        for channels in sizes.channels
        for mode in MODES
        for name, block in BLOCKS.items()
        if not (mode == "forward" and block.forward_of)
    ]


class Budget:
    """The time that is left, and how much of it a case will take."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.seconds_per_mac: dict[tuple[object, ...], float] = {}

    def foretold(self, case: Case) -> float:
        """Seconds of one call, from the last size of the block; before there is one, from 5 GMAC/s."""
        return case.macs * self.seconds_per_mac.get(self._kind(case), 1 / (5 * GIGA))

    def measured(self, case: Case, seconds: float) -> None:
        self.seconds_per_mac[self._kind(case)] = seconds / case.macs

    def left(self) -> float:
        return self.end - time.monotonic()

    @staticmethod
    def _kind(case: Case) -> tuple[object, ...]:
        return case.name, case.mode, case.dtype, case.device


@pytest.fixture(scope="session")
def budget(request: pytest.FixtureRequest) -> Budget:
    return Budget(60 * (QUICK if request.config.getoption("--quick") else FULL).minutes)


@cache
def peak_memory(name: str, channels: int, mode: Mode, side: int, device: str) -> int:
    module = BLOCKS[name].make(channels)
    return measure.memory(measure.prepare(module, (1, channels, side, side), mode, device=device), device).peak


def test_block(case: Case, budget: Budget, benchmark, request: pytest.FixtureRequest) -> None:
    block = BLOCKS[case.name]
    if reason := measure.failure(block, case.device):
        pytest.fail(f"not measured, because it is wrong: {reason}")
    small = [(s**2, peak_memory(case.name, case.channels, case.mode, s, case.device)) for s in (17, 33)]
    gigabytes = case.batch * measure.extrapolate(small, case.side**2) / GIGA
    if gigabytes > (limit := request.config.getoption("--memory-limit")):
        pytest.skip(f"{case}: out of memory, {gigabytes:.1f} GB of {limit:g}")
    predicted = budget.foretold(case)
    rounds = min(20, max(1, int(1 / predicted)))
    if predicted > budget.left():
        pytest.skip(f"{case}: out of time, {predicted:.0f} s of the {max(0, budget.left()):.0f} s left")

    shape = (case.batch, case.channels, case.side, case.side)
    call = measure.prepare(block.make(case.channels), shape, case.mode, case.dtype, case.device)

    def synchronized() -> None:
        call()
        measure.synchronize(case.device)

    benchmark.group = str(case).removesuffix(f"-{case.name}")
    benchmark.name = case.name
    benchmark.extra_info.update(
        block=case.name,
        shape=shape,
        mode=case.mode,
        dtype=str(case.dtype),
        forward_macs=case.macs,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    benchmark.pedantic(synchronized, rounds=rounds, warmup_rounds=int(predicted < 2))
    budget.measured(case, benchmark.stats.stats.median)
