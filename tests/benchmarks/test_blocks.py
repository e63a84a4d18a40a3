"""Every block compared with its slow form and its formulas, and the facts that the comparison depends on."""

from functools import partial

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure, slow
from benchmarks.blocks import BLOCKS, Block, NonLocal, PositionAttention
from benchmarks.costs.unit_pairs import wrong_units
from benchmarks.measure import failure
from ema_attention import EMAUnit
from tests.plain import PublishedEMAU


@pytest.mark.parametrize("name", BLOCKS)
def test_block_is_its_slow_form_and_costs_what_its_formulas_say(name):
    assert failure(BLOCKS[name]) is None


def test_both_units_differentiate_what_they_say():
    assert wrong_units() is None


class ScaledAttention(PositionAttention):
    """PAM with a softmax that is a little too flat."""

    def forward(self, x):
        with torch.no_grad():
            self.query.weight *= 0.99
        return super().forward(x)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"make": ScaledAttention}, "its output in eval mode is off its slow form's by"),
        ({"slow": partial(slow.emau, gradient="all")}, "its gradient of x in eval mode is off"),
        ({"parameters": lambda c: 7}, "its parameters are 560, its formula's 7"),
        ({"macs": lambda c, h, w: 7}, "its formula's 7"),
    ],
)
def test_a_block_that_is_wrong_is_found_out(change, reason):
    block: Block = BLOCKS["PAM" if "make" in change else "EMAUnit"]._replace(**change)
    assert reason in failure(block)


def test_parameters_at_512_channels_are_the_published_ones():
    counts = {name: BLOCKS[name].parameters(512) for name in ("EMAUnit", "Non-local", "PAM", "CAM")}
    assert counts == {"EMAUnit": 525_824, "Non-local": 525_568 + 1_024, "PAM": 328_321, "CAM": 1}


def test_macs_at_512_channels_are_those_of_the_literature():
    giga = {name: round(BLOCKS[name].macs(512, 65, 65) / 1e9, 2) for name in BLOCKS}
    expected = {"EMAU as published": 3.18, "Non-local": 11.35, "PAM": 11.67, "CAM": 2.22, "EMAUnit": 2.18}
    assert {name: giga[name] for name in expected} == expected


def test_weights_go_from_one_unit_to_the_other():
    published, unit = PublishedEMAU(16), EMAUnit(16)
    x = torch.randn(2, 16, 5, 4, generator=torch.Generator().manual_seed(0))
    for training in (True, False):
        unit.load_state_dict(published.state_dict())
        torch.testing.assert_close(unit.train(training)(x), published.train(training)(x), rtol=1e-4, atol=1e-5)


def test_fused_attention_takes_the_fast_kernel():
    block = NonLocal(32, fused=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        block(torch.randn(1, 32, 8, 8))
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in {event.name for event in profiler.events()}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_formulas_count_what_runs_on_cuda(name):
    block = BLOCKS[name]
    height, width = block.sizes[-1]
    with FakeTensorMode(), torch.device("cuda"):
        counted = measure.macs(block.make(16).eval(), torch.empty(1, 16, height, width))
    assert counted == block.macs_on("cuda:1", 16, height, width)


@pytest.mark.parametrize("name", ["EMAUnit", 'EMAUnit, gradient="all"'])
def test_the_unit_is_compared_where_it_runs_conv1_and_where_it_folds_it(name):
    published = BLOCKS["EMAU as published"]
    runs_conv1 = [BLOCKS[name].macs(16, h, w) == published.macs(16, h, w) for h, w in BLOCKS[name].sizes]
    assert runs_conv1 == [True, False]
    wrong = BLOCKS[name]._replace(macs=published.macs)  # right at the first size
    assert "its formula's" in failure(wrong)
