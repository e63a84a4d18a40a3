"""The blocks that EMAUnit is compared with, each written from its paper, and ``BLOCKS``, the one list of them.

x is (B, C, H, W) and N = H·W throughout. To add a block: a class here, its slow form in ``slow.py``, and
a row in ``BLOCKS``. Every test, and every benchmark of costs, is made from the rows. ``TRAINED`` is what ``accuracy``
trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import slow
from ema_attention import EMAUnit, GradientMode
from ema_attention._forms import FOLDS_FROM
from tests.plain import PublishedEMAU

MakeBlock = Callable[[int], nn.Module]
"""Makes a block for a number of channels C."""

NUM_BASES = 64  # K of EMAU and R of Hamburger, as in both papers
NUM_STAGES = 3


class NonLocal(nn.Module):
    """Non-local block, embedded Gaussian (Wang et al., CVPR 2018); ``subsample`` is its 2×2 max-pool of the keys.

    ``fused`` computes the same through scaled_dot_product_attention. Its inputs are made contiguous, because
    others take its slow path.
    """

    def __init__(self, channels: int, *, subsample: bool = False, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused
        self.pool = nn.MaxPool2d(2) if subsample else nn.Identity()
        self.theta = nn.Conv2d(channels, channels // 2, 1)
        self.phi = nn.Conv2d(channels, channels // 2, 1)
        self.g = nn.Conv2d(channels, channels // 2, 1)
        self.w = nn.Sequential(nn.Conv2d(channels // 2, channels, 1), nn.BatchNorm2d(channels))
        nn.init.zeros_(self.w[1].weight)

    def forward(self, x: Tensor) -> Tensor:
        keys = self.pool(x)
        theta, phi, g = self.theta(x).flatten(2), self.phi(keys).flatten(2), self.g(keys).flatten(2)  # (B, C/2, N)
        if self.fused:
            theta, phi, g = (t.mT.contiguous()[:, None] for t in (theta, phi, g))  # (B, 1, N, C/2)
            out = F.scaled_dot_product_attention(theta, phi, g, scale=1.0)[:, 0].mT
        else:
            out = g @ (theta.mT @ phi).softmax(-1).mT
        return x + self.w(out.unflatten(2, x.shape[2:]))


class PositionAttention(nn.Module):
    """DANet's position attention, PAM (Fu et al., CVPR 2019). Its learned gain starts at ``gain``: 0 in the paper."""

    def __init__(self, channels: int, *, gain: float = 0.0) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1)
        self.key = nn.Conv2d(channels, channels // 8, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.tensor([gain]))

    def forward(self, x: Tensor) -> Tensor:
        attention = (self.query(x).flatten(2).mT @ self.key(x).flatten(2)).softmax(-1)  # (B, N, N)
        return self.gamma * (self.value(x).flatten(2) @ attention.mT).view_as(x) + x


class ChannelAttention(nn.Module):
    """DANet's channel attention, CAM (Fu et al., CVPR 2019). Its learned gain starts at ``gain``: 0 in the paper."""

    def __init__(self, channels: int, *, gain: float = 0.0) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.tensor([gain]))

    def forward(self, x: Tensor) -> Tensor:
        features = x.flatten(2)
        energy = features @ features.mT  # (B, C, C)
        attention = (energy.amax(-1, keepdim=True) - energy).softmax(-1)
        return self.gamma * (attention @ features).view_as(x) + x


class DualAttention(nn.Module):
    """PAM and CAM on the same features, summed: what DANet's head computes between its 3×3 convolutions."""

    def __init__(self, channels: int, *, gain: float = 0.0) -> None:
        super().__init__()
        self.position = PositionAttention(channels, gain=gain)
        self.channel = ChannelAttention(channels, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.position(x) + self.channel(x)


class Hamburger(nn.Module):
    """Hamburger with NMF as its ham (Geng et al., ICLR 2021): 6 multiplicative updates in training, 7 in eval.

    Every forward draws new bases, and the coefficients start at a softmax over them. The gradient is the paper's
    one-step gradient: only the last update is differentiated.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.lower = nn.Conv2d(channels, channels, 1)
        self.upper = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.lower(x)).flatten(2)  # (B, C, N)
        bases = F.normalize(torch.rand(len(x), x.shape[1], NUM_BASES, dtype=x.dtype, device=x.device), dim=1)
        with torch.no_grad():
            codes = (y.mT @ bases).softmax(-1)  # (B, N, R)
            for _ in range(5 if self.training else 6):
                bases, codes = self._update(y, bases, codes)
        bases, codes = self._update(y, bases, codes)
        y = (bases @ codes.mT).view_as(x)
        return F.relu(x + self.upper(y))

    @staticmethod
    def _update(y: Tensor, bases: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        codes = codes * (y.mT @ bases) / (codes @ (bases.mT @ bases) + 1e-6)
        bases = bases * (y @ codes) / (bases @ (codes.mT @ codes) + 1e-6)
        return bases, codes


class DoubleAttention(nn.Module):
    """A²-Net's double attention (Chen et al., NeurIPS 2018): gather by B, distribute by V, C/4 channels each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, channels // 4, 1)
        self.b = nn.Conv2d(channels, channels // 4, 1)
        self.v = nn.Conv2d(channels, channels // 4, 1)
        self.w = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gathered = self.a(x).flatten(2) @ self.b(x).flatten(2).softmax(-1).mT  # (B, C/4, C/4)
        out = gathered @ self.v(x).flatten(2).softmax(1)
        return x + self.w(out.unflatten(2, x.shape[2:]))


class CrissCross(nn.Module):
    """CCNet's recurrent criss-cross attention (Huang et al., ICCV 2019): twice over each position's row and column."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1)
        self.key = nn.Conv2d(channels, channels // 8, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self._attend(self._attend(x))

    def _attend(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        query, key, value = self.query(x), self.key(x), self.value(x)
        column = query.permute(0, 3, 2, 1) @ key.permute(0, 3, 1, 2)  # (B, W, H, H)
        itself = torch.eye(height, dtype=torch.bool, device=x.device)
        column = column.masked_fill(itself, -math.inf)  # a position is in its row already
        row = query.permute(0, 2, 3, 1) @ key.permute(0, 2, 1, 3)  # (B, H, W, W)
        attention = torch.cat([column.transpose(1, 2), row], -1).softmax(-1)  # (B, H, W, H + W)
        column, row = attention[..., :height].transpose(1, 2), attention[..., height:]
        out = (column @ value.permute(0, 3, 2, 1)).permute(0, 3, 2, 1)
        return self.gamma * (out + (row @ value.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)) + x


class Block(NamedTuple):
    """What the benchmarks know of a block."""

    make: MakeBlock
    slow: Callable[[Mapping[str, Tensor], Tensor, bool], Tensor]
    """Its independent form: maps (parameters and buffers by name, x, training) to the output."""
    parameters: Callable[[int], int]
    """Their number, for C."""
    macs: Callable[[int, int, int], int]
    """Multiply-accumulates of an eval forward of one sample on a CPU, for C, H and W."""
    forward_of: str | None = None
    """The block that has the same forward. Only the gradients of the two differ."""
    sizes: tuple[tuple[int, int], ...] = ((4, 5),)
    """(H, W) where it is compared with its slow form and its formulas: one for each form that it runs in."""
    cuda_macs: Callable[[int, int, int], int] | None = None
    """The same as ``macs`` on CUDA, where other products run there."""

    def macs_on(self, device: str, channels: int, height: int, width: int) -> int:
        """Multiply-accumulates of an eval forward of one sample on a device."""
        on_cuda = self.cuda_macs if torch.device(device).type == "cuda" else None
        return (on_cuda or self.macs)(channels, height, width)


def _emau(channels: int) -> int:
    return 2 * channels**2 + 3 * channels


def _emau_macs(c: int, h: int, w: int) -> int:
    return 2 * c**2 * h * w + (2 * NUM_STAGES + 1) * h * w * NUM_BASES * c


def _unit_macs(c: int, h: int, w: int) -> int:
    if h * w <= FOLDS_FROM * 2 * NUM_STAGES * NUM_BASES:  # few positions: conv1 is run
        return _emau_macs(c, h, w)
    to_x_and_back = 2 * NUM_STAGES * c * (c + 1) * NUM_BASES  # by [weight | bias]
    return _emau_macs(c, h, w) - c**2 * h * w + to_x_and_back


def _non_local(channels: int) -> int:
    return 4 * channels * (channels // 2) + 3 * (channels // 2) + 3 * channels


def _non_local_macs(c: int, h: int, w: int, stride: int = 1) -> int:
    n, keys = h * w, (h // stride) * (w // stride)
    return c**2 * n + c**2 * keys + c * n * keys


def _position(channels: int) -> int:
    return channels**2 + 2 * channels * (channels // 8) + channels + 2 * (channels // 8) + 1


def _position_macs(c: int, h: int, w: int) -> int:
    n = h * w
    return 5 * c**2 * n // 4 + n**2 * (c // 8 + c)


def _channel_macs(c: int, h: int, w: int) -> int:
    return 2 * c**2 * h * w


def _hamburger_macs(c: int, h: int, w: int, updates: int = 7) -> int:
    n, r = h * w, NUM_BASES
    return 2 * c**2 * n + 2 * n * r * c + updates * 2 * (n * r * c + r**2 * (n + c))


def _criss_cross_macs(c: int, h: int, w: int) -> int:
    n = h * w
    return 2 * (5 * c**2 * n // 4 + n * (h + w) * (c // 8 + c))


UNIT_SIZES = ((4, 5), (45, 46))
"""Few positions, and enough for every form of the unit that saves time or memory."""

BLOCKS: dict[str, Block] = {
    "EMAU as published": Block(
        partial(PublishedEMAU, num_bases=NUM_BASES, stages=NUM_STAGES), slow.emau, _emau, _emau_macs
    ),
    "EMAUnit": Block(
        partial(EMAUnit, num_bases=NUM_BASES, stages=NUM_STAGES),
        slow.emau,
        _emau,
        _unit_macs,
        sizes=UNIT_SIZES,
        cuda_macs=_emau_macs,  # conv1 is always run there
    ),
    'EMAUnit, gradient="all"': Block(
        partial(EMAUnit, num_bases=NUM_BASES, stages=NUM_STAGES, gradient="all"),
        partial(slow.emau, gradient="all"),
        _emau,
        _unit_macs,
        forward_of="EMAUnit",
        sizes=UNIT_SIZES,
        cuda_macs=_emau_macs,
    ),
    "Non-local": Block(NonLocal, slow.non_local, _non_local, _non_local_macs),
    "Non-local, sub-sampled": Block(
        partial(NonLocal, subsample=True),
        partial(slow.non_local, subsample=True),
        _non_local,
        partial(_non_local_macs, stride=2),
    ),
    "Non-local, fused attention": Block(partial(NonLocal, fused=True), slow.non_local, _non_local, _non_local_macs),
    "PAM": Block(PositionAttention, slow.position_attention, _position, _position_macs),
    "CAM": Block(ChannelAttention, slow.channel_attention, lambda c: 1, _channel_macs),
    "PAM + CAM": Block(
        DualAttention,
        slow.dual_attention,
        lambda c: _position(c) + 1,
        lambda c, h, w: _position_macs(c, h, w) + _channel_macs(c, h, w),
    ),
    "Hamburger (NMF)": Block(Hamburger, slow.hamburger, _emau, _hamburger_macs),
    "Double attention (A²)": Block(
        DoubleAttention,
        slow.double_attention,
        lambda c: c**2 + 3 * (c // 4) + c,
        lambda c, h, w: c**2 * h * w + 2 * h * w * (c // 4) ** 2,
    ),
    "Criss-cross": Block(CrissCross, slow.criss_cross, _position, _criss_cross_macs),
}

DEFAULTS = "EMAUnit, defaults"


def unit_name(gradient: str, gamma: float) -> str:
    """What a trained EMAUnit is called: by its ``gradient``, and by γ, its ``layer_scale``."""
    return DEFAULTS if (gradient, gamma) == ("none", 1) else f"EMAUnit, {gradient}, γ {gamma:g}"


GRADIENTS: tuple[GradientMode, ...] = ("none", "last", "all")
GAMMAS = (0, 0.1, 0.25, 0.5, 1)
TRAINED: dict[str, MakeBlock] = {
    "no block": lambda channels: nn.Identity(),
    "Non-local": BLOCKS["Non-local"].make,
    "DANet (PAM + CAM)": BLOCKS["PAM + CAM"].make,
    "DANet, gain from 1": partial(BLOCKS["PAM + CAM"].make, gain=1.0),
    "Hamburger": BLOCKS["Hamburger (NMF)"].make,
    **{
        unit_name(gradient, gamma): partial(BLOCKS["EMAUnit"].make, gradient=gradient, layer_scale=gamma)
        for gradient in GRADIENTS
        for gamma in GAMMAS
    },
}
"""What ``accuracy`` puts in the place of a block, by the names in its rows.

Non-local's last norm and DANet's gains start at 0, as in their papers; Hamburger's last norm starts at 1.
"""
