"""The measurements on cases whose answer is known."""

import pytest
import torch
from torch import nn

from benchmarks import measure
from benchmarks.costs.sizes import MEBIBYTE
from benchmarks.measure import Memory
from tests.plain import PublishedEMAU


def test_memory_of_a_known_computation():
    x = torch.zeros(MEBIBYTE // 4)

    def call():
        first = x + 1.0  # 1 MiB
        second = torch.cat([first, first])  # 3 MiB
        del first
        return second[: x.numel()] * 2.0  # 3 MiB, of which 1 is returned

    call()
    assert measure.memory(call) == Memory(peak=pytest.approx(3 * MEBIBYTE, abs=64), held=0)


def test_memory_held_for_the_backward_of_known_layers():
    layers = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Sigmoid())
    output = 8 * 64 * 64 * 4
    statistics = 2 * 8 * 4  # the batch's mean and deviation; the sigmoid keeps its own output, the result
    assert measure.held_for_backward(layers, (1, 8, 64, 64)) == output + statistics


def test_memory_is_the_same_in_every_run():
    call = measure.prepare(PublishedEMAU(32), (2, 32, 9, 9), "training step")
    call()
    assert len({measure.memory(call) for _ in range(3)}) == 1


def test_macs_of_a_known_layer():
    assert measure.macs(nn.Conv2d(8, 4, 3, padding=1), torch.zeros(2, 8, 6, 5)) == 2 * 6 * 5 * 4 * 8 * 9


def test_a_training_step_differentiates_input_and_parameters():
    module = nn.Conv2d(4, 4, 1)
    step = measure.prepare(module, (1, 4, 3, 3), "training step")
    seen = {}
    module.weight.register_hook(lambda grad: seen.update(weight=grad.shape))
    module.register_full_backward_hook(lambda _, grad_input, grad_output: seen.update(x=grad_input[0].shape))
    step()
    assert seen == {"weight": (4, 4, 1, 1), "x": (1, 4, 3, 3)}
    assert module.weight.grad is None  # nothing is left over for the next step


def test_a_forward_is_in_eval_mode_and_without_gradients():
    module = nn.Dropout(0.5)
    out = measure.prepare(nn.Sequential(nn.Conv2d(4, 4, 1), module), (1, 4, 3, 3), "forward")()
    assert not out.requires_grad
    assert not module.training


def test_calls_are_measured_in_turns():
    order = []
    samples = measure.interleaved({name: lambda name=name: order.append(name) for name in "abc"}, seconds=0, least=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert [len(times) for times in samples.values()] == [3, 3, 3]


def test_summary():
    assert measure.summary([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "quartiles": [2.0, 4.0], "samples": 5}
    assert measure.summary([2.0]) == {"median": 2.0, "quartiles": [2.0, 2.0], "samples": 1}


def test_extrapolation_is_exact_for_a_sum_of_linear_and_square():
    points = [(n, 3.0 * n**2 + 5.0 * n) for n in (10, 20, 40)]
    assert measure.extrapolate(points, 1_000) == pytest.approx(3_005_000)
    assert measure.extrapolate(points[:1], 100) == 3_500.0
    assert measure.extrapolate([(10, 10.0), (20, 15.0)], 40) == 30.0  # less than linear is taken as linear


def test_exponent():
    assert measure.exponent([(10, 7.0), (100, 700.0), (1_000, 70_000.0)]) == pytest.approx(2)


@pytest.mark.cuda
def test_memory_of_a_known_computation_on_a_gpu():
    x = torch.zeros(MEBIBYTE, device="cuda")
    taken = measure.memory(lambda: (x + 1.0) * 2.0, "cuda")
    assert taken == Memory(peak=8 * MEBIBYTE, held=0)
