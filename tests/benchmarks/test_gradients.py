"""What a sweep notes of the gradients while a network is trained."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD

from benchmarks.accuracy.gradients import means_of, noted
from ema_attention import EMAUnit, em_attention


def train(net: nn.Sequential, steps: int) -> list[list[float]]:
    """The norms of the gradients of the first two convolutions at each step."""
    optimizer = SGD(net.parameters(), 0.1)
    norms = []
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(2, 3, 6, 5)).square().mean().backward()
        norms.append([torch.cat([p.grad.flatten() for p in conv.parameters()]).norm().item() for conv in net[:2]])
        optimizer.step()
    return norms


def test_each_step_is_noted_and_those_that_are_taken_again_are_noted_anew(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Identity(), nn.Conv2d(8, 2, 1))
    path = tmp_path / "run" / "gradients.jsonl"
    with noted(net[:2], net[2], path, 0):
        first = train(net, 6)
    with noted(net[:2], net[2], path, 4):
        again = train(net, 3)
    train(net, 1)  # nobody notes this one
    norms = [json.loads(line)["stages"] for line in path.read_text().splitlines()]
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(first[:4] + again))
    means = means_of(path)
    assert means.keys() == {1, 2, 4}
    assert means[1].keys() == {"stages"}
    for first_step, steps in ((1, norms[:1]), (2, norms[1:3]), (4, norms[3:7])):
        assert means[first_step]["stages"] == pytest.approx(torch.tensor(steps).mean(0).tolist(), rel=1e-3)
    with (
        pytest.raises(ValueError, match=r"jsonl must have a line for each of the 9 steps that were taken; got 7"),
        noted(net[:2], net[2], path, 9),
    ):
        pass


@pytest.mark.parametrize("gradient", ["none", "all"])
def test_the_gradient_through_the_attention_is_told_from_that_through_the_sum(gradient: str, tmp_path: Path) -> None:
    unit = EMAUnit(8, 4, gradient=gradient, layer_scale=0.5)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), unit)
    x, probe = torch.randn(2, 3, 6, 5), torch.randn(2, 8, 6, 5)
    features = net[0](x).detach().requires_grad_()
    attended = em_attention(unit.conv1(features), unit.mu, unit.stages, gradient=gradient)
    y = (features.detach() + unit.conv2(attended.out.relu())).relu()  # nothing comes through the sum
    reached = torch.autograd.grad((probe * y).sum(), features, allow_unused=True)[0]
    through_sum = probe * (y > 0)
    expected = 0.0 if reached is None else (reached.norm() / through_sum.norm()).item()
    with noted(net[:1], unit, tmp_path / "gradients.jsonl", 0):
        with torch.no_grad():
            net.eval()(x)  # an evaluation is not noted
        (probe * net.train()(x)).sum().backward()
        SGD(net.parameters(), 0.0).step()
    notes = means_of(tmp_path / "gradients.jsonl")[1]
    assert notes["branch"] == pytest.approx([expected], rel=1e-3, abs=1e-6)
    assert (expected > 0) == (gradient == "all")
    assert not unit._forward_hooks


def test_a_step_is_freed_and_one_without_a_label_is_noted(tmp_path: Path) -> None:
    unit = EMAUnit(8, 4, gradient="all")
    net, x = nn.Sequential(nn.Conv2d(3, 8, 1), unit), torch.randn(2, 3, 6, 5)
    with noted(net[:1], unit, tmp_path / "gradients.jsonl", 0):
        y = net(x)
        (0 * y).sum().backward()
        SGD(net.parameters(), 0.1).step()
        alive = weakref.ref(y)
        del y
        gc.collect()
    assert alive() is None
    assert means_of(tmp_path / "gradients.jsonl") == {1: {"branch": [0.0], "stages": [0.0]}}
