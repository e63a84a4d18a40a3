"""EMAUnit and the published unit as a pair: the same weights, checked, and made ready to be timed in turns."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import slow
from benchmarks.blocks import BLOCKS, GRADIENTS, NUM_BASES, NUM_STAGES, UNIT_SIZES, Block, MakeBlock
from benchmarks.measure import Mode, failure, prepare
from ema_attention import EMAUnit, GradientMode
from tests.plain import PublishedEMAU

Precision = Literal["float32", "bfloat16 model", "bfloat16 autocast"]
"""The dtype of weights and x. Autocast: both in float32, the forward under torch.autocast, the backward outside it."""


class Pair(NamedTuple):
    """The two units, or two calls of them."""

    unit: nn.Module
    published: nn.Module


class OnTokens(nn.Module):
    """The published unit on tokens (B, N, C): it gets them as (B, C, 1, N), and its output is turned back."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.unit(x.mT.unsqueeze(2))
        return y.squeeze(2).mT


class Autocast(nn.Module):
    """A module's forward under torch.autocast to bfloat16."""

    def __init__(self, module: nn.Module, device: str) -> None:
        super().__init__()
        self.module = module
        self.device_type = torch.device(device).type

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device_type, torch.bfloat16):
            y: Tensor = self.module(x)
        return y


def units(channels: int, gradient: GradientMode, tokens: bool = False) -> Pair:
    """Both units with the same weights, on (B, C, H, W) or on tokens (B, N, C)."""
    published = PublishedEMAU(channels, NUM_BASES, NUM_STAGES, gradient=gradient)
    unit = EMAUnit(channels, NUM_BASES, NUM_STAGES, gradient=gradient, channel_dim=-1 if tokens else 1)
    unit.load_state_dict(published.state_dict())
    return Pair(unit, OnTokens(published) if tokens else published)


def wrong_units(device: str = "cpu") -> str | None:
    """The first error of either unit in any gradient mode, on tokens, or of Non-local; None if there is none."""
    blocks = {"Non-local": BLOCKS["Non-local"]}
    for name, make in (("EMAU as published", PublishedEMAU), ("EMAUnit", EMAUnit)):
        for gradient in GRADIENTS:
            blocks[f"{name}, gradient={gradient!r}"] = _differentiated(name, make, gradient)
    reasons = {name: failure(block, device) for name, block in blocks.items()}
    wrong = next((f"{name}: {reason}" for name, reason in reasons.items() if reason), None)
    return wrong or _wrong_on_tokens(device)


@cache  # so that failure, which is slow, knows it again
def _differentiated(name: str, make: MakeBlock, gradient: GradientMode) -> Block:
    """A block whose ``make`` gives it a gradient, and its slow form with the same."""
    return BLOCKS[name]._replace(make=partial(make, gradient=gradient), slow=partial(slow.emau, gradient=gradient))


def _wrong_on_tokens(device: str) -> str | None:
    """Why the pair on tokens is not the published unit on the same positions, or None."""
    for height, width in UNIT_SIZES:
        published = PublishedEMAU(16, NUM_BASES, NUM_STAGES).to(device).eval()
        x = torch.randn(2, height * width, 16, generator=torch.Generator().manual_seed(0)).to(device)
        pair = units(16, "none", tokens=True)
        pair.unit.load_state_dict(published.state_dict())
        pair.published.unit.load_state_dict(published.state_dict())
        with torch.no_grad():
            expected = published(x.mT.reshape(2, 16, height, width)).flatten(2).mT
            for name, module in pair._asdict().items():
                error = ((module.to(device).eval()(x) - expected).abs().max() / expected.abs().max()).item()
                if not error <= 1e-4:  # NaN fails too
                    return f"{name} on tokens: its output is off the published unit's by {error:.1e}"
    return None


def prepare_pair(
    pair: Pair, shape: tuple[int, ...], mode: Mode, precision: Precision = "float32", device: str = "cpu"
) -> dict[str, Callable[[], Tensor]]:
    """One run of each of the two, by name, as :func:`benchmarks.measure.prepare` makes it."""
    dtype = torch.bfloat16 if precision == "bfloat16 model" else torch.float32
    calls = {}
    for name, module in pair._asdict().items():
        run = Autocast(module, device) if precision == "bfloat16 autocast" else module
        calls[name] = prepare(run, shape, mode, dtype, device)
    return calls
