"""EMAUnit compared with the published unit: the ratios that it has to reach, and those that it reaches here.

The weights of one are loaded into the other, and the calls of a ratio are measured in turns in this process.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.blocks import NUM_BASES, NUM_STAGES, NonLocal
from benchmarks.costs import grid
from benchmarks.costs.sizes import Sizes
from benchmarks.costs.unit_pairs import Pair, Precision, prepare_pair, units
from benchmarks.measure import Mode, held_for_backward, interleaved, macs, memory, prepare, summary
from ema_attention import GradientMode

TRAINING: tuple[tuple[GradientMode, float], ...] = (("none", 0.70), ("last", 0.70), ("all", 0.70))
"""The gradient of a training step, and what it may take of the published form's time with that gradient."""
HALF: tuple[tuple[str, Mode, GradientMode, float], ...] = (
    ("eval forward / published", "forward", "none", 0.85),
    ('training step, gradient="none" / published', "training step", "none", 0.95),
    ('training step, gradient="all" / published form with that gradient', "training step", "all", 0.95),
)
"""The same in bfloat16: (quantity, mode, gradient, target)."""
TOKENS = (8, 196, 768)
"""(B, N, C) of a vision transformer."""


class BareProducts(nn.Module):
    """Only the matrix multiplies that an eval forward cannot avoid: 3 E, 3 M, μzᵀ and one C×C."""

    def __init__(self, batch: int, channels: int, positions: int) -> None:
        super().__init__()
        self.register_buffer("mu", torch.randn(batch, channels, NUM_BASES))
        self.register_buffer("z", torch.rand(batch, positions, NUM_BASES))
        self.register_buffer("weight", torch.randn(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        features = x.flatten(2)
        for _ in range(NUM_STAGES):
            features.mT @ self.mu
            features @ self.z
        return torch.bmm(self.weight.expand(len(x), -1, -1), self.mu @ self.z.mT)


def measure_targets(sizes: Sizes, device: str, say: Callable[[str], None]) -> list[dict]:
    """Rows of ``{"quantity", "value", "target", "unit", "beside"}``; ``say`` is told what is measured next.

    ``value`` is a ratio, or the quantity itself, and must be at most ``target``. Where it is a ratio of times,
    ``unit`` and ``beside`` are these times.
    """
    _, c, side, _ = sizes.table
    rows: list[dict] = []

    def row(quantity: str, value: float, target: float, **parts: object) -> None:
        rows.append({"quantity": quantity, "value": value, "target": target, **parts})

    def time(
        quantity: str,
        pair: Pair,
        shape: tuple[int, ...],
        mode: Mode,
        target: float,
        precision: Precision = "float32",
    ) -> None:
        say(f"{quantity}, {shape}")
        calls = prepare_pair(pair, shape, mode, precision, device)
        samples = interleaved(calls, seconds=sizes.seconds, device=device)
        times = {"unit": summary(samples["unit"]), "beside": summary(samples["published"])}
        value = times["unit"]["median"] / times["beside"]["median"]
        row(f"{quantity}, {shape}", value, target, **times)

    def image(batch: int) -> tuple[int, ...]:
        return batch, c, side, side

    for batch, target in ((4, 0.50), (1, 0.65)):
        time("eval forward / published", units(c, "none"), image(batch), "forward", target)
    for batch in (4, 1):
        products = BareProducts(batch, c, side**2)
        pair = Pair(units(c, "none").unit, products)
        time("eval forward / bare matrix multiplies", pair, image(batch), "forward", 1.15)
    for gradient, target in TRAINING:
        quantity = f'training step, gradient="{gradient}" / published form with that gradient'
        time(quantity, units(c, gradient), image(4), "training step", target)
    pair = Pair(units(c, "all").unit, NonLocal(c))
    time('training step, gradient="all" / Non-local', pair, image(2), "training step", 0.16)
    precisions: tuple[Precision, ...] = ("bfloat16 model", "bfloat16 autocast")
    for precision in precisions:
        for name, mode, gradient, target in HALF:
            for batch in (4, 1):
                time(f"{precision}: {name}", units(c, gradient), image(batch), mode, target, precision)
    for name, mode, _, _ in HALF[:2]:
        time(f"tokens: {name}", units(TOKENS[-1], "none", tokens=True), TOKENS, mode, 1.0)

    say("memory")
    for batch in (4, 1):
        shape = (batch, c, side, side)
        output = batch * c * side**2 * 4
        unit, published = units(c, "none")
        peaks = [memory(prepare(m, shape, "forward", device=device), device).peak / output for m in (unit, published)]
        row(f"peak memory of an eval forward, in outputs, {shape}", peaks[0], 1.6, published=peaks[1])
        for gradient, target in (("none", 1.3), ("last", 1.5), ("all", 1.8)):
            unit, published = units(c, gradient)
            held = [held_for_backward(module, shape, device=device) / output for module in (unit, published)]
            quantity = f'held from forward to backward, in outputs, gradient="{gradient}", {shape}'
            row(quantity, held[0], target, published=held[1])

    unit, published = units(512, "none")
    counts = [macs(module.eval(), torch.randn(1, 512, 65, 65)) for module in (unit, published)]
    row("GMAC of an eval forward, (1, 512, 65, 65)", counts[0] / 1e9, 2.20, published=counts[1] / 1e9)

    large = sizes.large_side
    say(f"eval forward at {large}×{large}")
    unit = units(c, "none").unit
    shapes = {name: (1, c, s, s) for name, s in (("unit", large), ("beside", side))}
    calls = {name: prepare(unit, shape, "forward", device=device) for name, shape in shapes.items()}
    times = {k: summary(v) for k, v in interleaved(calls, seconds=sizes.seconds, device=device).items()}
    value = times["unit"]["median"] / large**2 / (times["beside"]["median"] / side**2)
    row(f"time per position of an eval forward, {shapes['unit']} / {shapes['beside']}", value, 1.2, **times)
    peak = memory(calls["unit"], device).peak / (c * large**2 * 4)
    row(f"peak memory of an eval forward, in outputs, {shapes['unit']}", peak, 1.6)

    say("agreement")
    unit, published = (module.to(device).eval() for module in units(c, "none"))
    x = torch.randn(4, c, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        value, expected = unit(x), published(x)
    error = ((value - expected).abs().max() / expected.abs().max()).item()
    row(f"largest error of the output in eval, relative, {tuple(x.shape)}", error, 1e-5)

    if torch.device(device).type == "cuda":
        pairs = {"eager": units(c, "none"), "compiled": Pair(*map(torch.compile, units(c, "none")))}
        for name, pair in pairs.items():
            quantity = f"eval forward / published, bfloat16, {name}"
            time(quantity, pair, image(16), "forward", 1.0, "bfloat16 model")
    return rows


def grid_targets(cells: list[dict]) -> list[dict]:
    """The targets of the cells of :func:`benchmarks.costs.grid.measure_grid`, as rows like the others."""
    rows = []
    for variant, group in grid.variants(cells).items():
        word = "" if variant == "eager" else f"{variant} "
        float32 = [cell for cell in group if cell["precision"] == "float32"]
        for where, target, chosen in (
            ("from 14×14", 1.0, [cell for cell in float32 if cell["side"] >= 14]),
            ("at 7×7", 1.1, [cell for cell in float32 if cell["side"] == 7]),
        ):
            if chosen:
                cell = grid.worst(chosen)
                quantity = f"worst {word}float32 cell {where} of {len(chosen)}: {grid.name(cell)}"
                times = {"unit": cell["unit"], "beside": cell["published"]}
                rows.append({"quantity": quantity, "value": grid.ratio(cell), "target": target, **times})
        if small := grid.small_float32(group):
            quantity = f"geometric mean of the {len(small)} {word}float32 cells up to {grid.SMALL}×{grid.SMALL}"
            rows.append({"quantity": quantity, "value": grid.geometric_mean(small), "target": 0.9})
    return rows
