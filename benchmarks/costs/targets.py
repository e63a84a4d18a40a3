"""EMAUnit compared with the published unit: the ratios that it has to reach, and those that it reaches here.

The weights of one are loaded into the other, and the calls of a ratio are measured in turns in this process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import slow
from benchmarks.blocks import BLOCKS, NUM_BASES, STAGES, NonLocal
from benchmarks.costs.sizes import Sizes
from benchmarks.measure import (
    Mode,
    failure,
    held_for_backward,
    interleaved,
    macs,
    memory,
    prepare,
    summary,
)
from ema_attention import EMAUnit, GradientMode
from tests.plain import PublishedEMAU

GRADIENTS: tuple[GradientMode, ...] = ("none", "last", "all")


class BareProducts(nn.Module):
    """Only the matrix multiplies that an eval forward cannot avoid: 3 E, 3 M, μzᵀ and one C×C."""

    def __init__(self, batch: int, channels: int, positions: int) -> None:
        super().__init__()
        self.register_buffer("mu", torch.randn(batch, channels, NUM_BASES))
        self.register_buffer("z", torch.rand(batch, positions, NUM_BASES))
        self.register_buffer("weight", torch.randn(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        features = x.flatten(2)
        for _ in range(STAGES):
            features.mT @ self.mu
            features @ self.z
        return torch.bmm(self.weight.expand(len(x), -1, -1), self.mu @ self.z.mT)


def wrong_units(device: str = "cpu") -> str | None:
    """The first error of either unit in any gradient mode, or of Non-local; None if there is none."""
    blocks = {"Non-local": BLOCKS["Non-local"]}
    for name, make in (("EMAU as published", PublishedEMAU), ("EMAUnit", EMAUnit)):
        for gradient in GRADIENTS:
            blocks[f"{name}, gradient={gradient!r}"] = BLOCKS[name]._replace(
                make=partial(make, gradient=gradient), slow=partial(slow.emau, gradient=gradient)
            )
    reasons = {name: failure(block, device) for name, block in blocks.items()}
    return next((f"{name}: {reason}" for name, reason in reasons.items() if reason), None)


def units(channels: int, gradient: GradientMode) -> tuple[PublishedEMAU, EMAUnit]:
    """Both units, with the same weights."""
    published = PublishedEMAU(channels, NUM_BASES, STAGES, gradient=gradient)
    unit = EMAUnit(channels, NUM_BASES, STAGES, gradient=gradient)
    unit.load_state_dict(published.state_dict())
    return published, unit


def measure_targets(sizes: Sizes, device: str, say: Callable[[str], None]) -> list[dict]:
    """Rows of ``{"quantity", "value", "target", "unit", "beside"}``; ``say`` is told what is measured next.

    ``value`` is a ratio, or the quantity itself, and must be at most ``target``. Where it is a ratio of times,
    ``unit`` and ``beside`` are these times.
    """
    _, c, side, _ = sizes.table
    rows: list[dict] = []

    def row(quantity: str, value: float, target: float, **parts: object) -> None:
        rows.append({"quantity": quantity, "value": value, "target": target, **parts})

    def time(quantity: str, unit: nn.Module, other: nn.Module, batch: int, mode: Mode, target: float) -> None:
        shape = (batch, c, side, side)
        say(quantity)
        calls = {
            "unit": prepare(unit, shape, mode, device=device),
            "beside": prepare(other, shape, mode, device=device),
        }
        times = {k: summary(v) for k, v in interleaved(calls, seconds=sizes.seconds, device=device).items()}
        value = times["unit"]["median"] / times["beside"]["median"]
        row(f"{quantity}, {shape}", value, target, **times)

    for batch, target in ((4, 0.65), (1, 0.75)):
        published, unit = units(c, "none")
        time("eval forward / published", unit, published, batch, "forward", target)
    for batch in (4, 1):
        floor = BareProducts(batch, c, side**2)
        time("eval forward / bare matrix multiplies", units(c, "none")[1], floor, batch, "forward", 1.15)
    for gradient, target in (("none", 0.80), ("last", 0.75), ("all", 0.75)):
        published, unit = units(c, gradient)
        quantity = f'training step, gradient="{gradient}" / published form with that gradient'
        time(quantity, unit, published, 4, "training step", target)
    quantity = 'training step, gradient="all" / Non-local'
    time(quantity, units(c, "all")[1], NonLocal(c), 2, "training step", 0.16)

    say("memory")
    for batch in (4, 1):
        shape = (batch, c, side, side)
        output = batch * c * side**2 * 4
        published, unit = units(c, "none")
        peaks = [memory(prepare(m, shape, "forward", device=device), device).peak / output for m in (unit, published)]
        row(f"peak memory of an eval forward, in outputs, {shape}", peaks[0], 1.6, published=peaks[1])
        for gradient, target in (("none", 1.3), ("last", 1.5), ("all", 1.8)):
            published, unit = units(c, gradient)
            held = [held_for_backward(module, shape, device=device) / output for module in (unit, published)]
            quantity = f'held from forward to backward, in outputs, gradient="{gradient}", {shape}'
            row(quantity, held[0], target, published=held[1])

    published, unit = units(512, "none")
    counts = [macs(module.eval(), torch.randn(1, 512, 65, 65)) for module in (unit, published)]
    row("GMAC of an eval forward, (1, 512, 65, 65)", counts[0] / 1e9, 2.20, published=counts[1] / 1e9)

    large = sizes.large_side
    say(f"eval forward at {large}×{large}")
    _, unit = units(c, "none")
    shapes = {name: (1, c, s, s) for name, s in (("unit", large), ("beside", side))}
    calls = {name: prepare(unit, shape, "forward", device=device) for name, shape in shapes.items()}
    times = {k: summary(v) for k, v in interleaved(calls, seconds=sizes.seconds, device=device).items()}
    value = times["unit"]["median"] / large**2 / (times["beside"]["median"] / side**2)
    row(f"time per position of an eval forward, {shapes['unit']} / {shapes['beside']}", value, 1.2, **times)
    peak = memory(calls["unit"], device).peak / (c * large**2 * 4)
    row(f"peak memory of an eval forward, in outputs, {shapes['unit']}", peak, 1.6)

    say("agreement")
    published, unit = (module.to(device).eval() for module in units(c, "none"))
    x = torch.randn(4, c, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        value, expected = unit(x), published(x)
    error = ((value - expected).abs().max() / expected.abs().max()).item()
    row(f"largest error of the output in eval, relative, {tuple(x.shape)}", error, 1e-5)

    if torch.device(device).type == "cuda":
        rows += _bfloat16(c, side, sizes.seconds, device, say)
    return rows


def _bfloat16(c: int, side: int, seconds: float, device: str, say: Callable[[str], None]) -> list[dict]:
    """The eval forward as it is used on a GPU: bfloat16, 16 samples, eager and compiled."""
    shape, rows = (16, c, side, side), []
    for name, transform in (("eager", lambda module: module), ("compiled", torch.compile)):
        say(f"bfloat16, {name}")
        published, unit = (transform(module.to(device, torch.bfloat16).eval()) for module in units(c, "none"))
        calls = {
            "unit": prepare(unit, shape, "forward", torch.bfloat16, device),
            "beside": prepare(published, shape, "forward", torch.bfloat16, device),
        }
        times = {k: summary(v) for k, v in interleaved(calls, seconds=seconds, device=device).items()}
        value = times["unit"]["median"] / times["beside"]["median"]
        rows.append({"quantity": f"eval forward / published, bfloat16, {name}, {shape}", "value": value, "target": 1})
        rows[-1].update(times)
    return rows
