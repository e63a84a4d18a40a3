"""The Expectation-Maximization Attention Unit (EMAU) of Li et al., ICCV 2019, arXiv 1907.13426, section 3.3."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ema_attention._checks import (
    GradientMode,
    check_positive_integers,
    check_settings,
    check_unit_input,
    check_unit_settings,
)
from ema_attention._forms import projection_form
from ema_attention._layout import Layout, flatten
from ema_attention._residual import residual
from ema_attention._steps import Problem, prepare, unit_norm
from ema_attention._torch import assign_to_buffer, autocast_dtype, is_recomputing, is_tracing
from ema_attention.functional import expectation_maximization

__all__ = ["EMAUnit"]


class EMAUnit(nn.Module):
    r"""Expectation-Maximization attention as a residual layer: same shape in and out, for any layout.

    ::

        y = relu(x + norm(conv2(relu(em_attention(conv1(x), mu, stages).out))))

    See :func:`em_attention` for the attention. The bases it starts from are the buffer ``mu``
    (1, C', K), a moving average over what EM found: each forward in training mode moves it, and eval
    leaves it alone. The new bases are averaged over the samples of the batch, of all ranks where
    torch.distributed is initialised (so every rank holds the same buffer, and every rank has to run the
    forward), then ``mu = normalise(decay · mu + (1 - decay) · average)``. A batch that is not finite moves
    no basis. (BatchNorm's running statistics, here as everywhere, do become NaN.) With ``decay=1`` the buffer never
    changes.

    Where activation checkpointing runs a forward again, it starts from the bases that the unit's last
    forward started from and moves nothing. (BatchNorm's running statistics move twice. And a unit that runs
    more than once before a backward is recomputed from its last start only; and one that torch.compile has
    compiled cannot tell: compile around the checkpoint, and allow graph breaks.)

    Where there are many positions, ``conv1`` is not run: its weights are folded into the bases, which gives the
    same function for less. (One with hooks, or replaced by a module of another kind, is always run.) With
    ``gradient="none"`` no gradient can reach it, and it is frozen. See :func:`plain_form`.

    Parameter names and shapes are those of the published EMANet weights.

    Args:
        channels: C, of the input and the output.
        num_bases: K.
        stages: EM stages T.
        inner_channels: C', the width of the space attended in; ``None`` for ``channels``, as published.
        decay: weight of the old bases in the moving average, from 0 to 1 (the paper's momentum 0.9; not
            BatchNorm's momentum, which weighs the new).
        gradient: what is differentiated; see :func:`em_attention`. ``"none"`` is the paper.
        scale: sharpness of the E-step.
        norm_layer: makes the norm after conv2 from a number of channels; it gets (B, C, H, W), or (B, C, 1, N)
            where x is no image.
        zero_init: start the norm's weight at 0, so that a unit inserted into a trained network changes
            nothing at first (but for the last ReLU).
        final_relu: whether the last ReLU is there; turn it off in token models and pre-activation nets.
        channel_dim: where the channels are in the input; 1 for (B, C, \*spatial), -1 for (B, N, C) and (B, H, W, C).
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Shape:
        x (B, C, \*spatial), or with the channels at ``channel_dim``; the output has x's shape and dtype,
        and its memory layout (``channels_last`` stays ``channels_last``).

    Raises:
        TypeError, ValueError: in the constructor for settings that make no sense; in ``forward`` for a
            shape that does not fit.

    Example:
        >>> unit = EMAUnit(64, num_bases=16)
        >>> unit(torch.randn(2, 64, 32, 32)).shape
        torch.Size([2, 64, 32, 32])
        >>> tokens = EMAUnit(64, final_relu=False, channel_dim=-1)
        >>> tokens(torch.randn(2, 196, 64)).shape
        torch.Size([2, 196, 64])
    """

    mu: Tensor

    def __init__(
        self,
        channels: int,
        num_bases: int = 64,
        stages: int = 3,
        *,
        inner_channels: int | None = None,
        decay: float = 0.9,
        gradient: GradientMode = "none",
        scale: float = 1.0,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        zero_init: bool = False,
        final_relu: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_settings(stages, scale, gradient)
        inner_channels = channels if inner_channels is None else inner_channels
        check_positive_integers(channels=channels, num_bases=num_bases, inner_channels=inner_channels)
        check_unit_settings(decay, channel_dim)
        self.channels = channels
        self.num_bases = num_bases
        self.stages = stages
        self.inner_channels = inner_channels
        self.decay = decay
        self.gradient: GradientMode = gradient
        self.scale = scale
        self.zero_init = zero_init
        self.final_relu = final_relu
        self.channel_dim = channel_dim
        self.register_buffer("mu", torch.empty(1, inner_channels, num_bases, device=device, dtype=dtype))
        self.conv1 = nn.Conv2d(channels, inner_channels, 1, device=device, dtype=dtype)
        self.conv2 = nn.Sequential(
            nn.Conv2d(inner_channels, channels, 1, bias=False, device=device, dtype=dtype),
            norm_layer(channels),
        )
        if device is not None or dtype is not None:
            self.conv2[1].to(device=device, dtype=dtype)
        self.map_collectors: list[tuple[dict[str, Tensor], str]] = []  # filled by _hand_out
        self._mu_before: Tensor | None = None  # what the last forward in training mode started from
        self.conv1.requires_grad_(gradient != "none")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the bases and the convolutions anew, as published: N(0, √(2/K)) then unit norm, N(0, √(2/C_out))."""
        with torch.no_grad():
            self.mu.normal_(0, math.sqrt(2 / self.num_bases))
            self.mu.copy_(F.normalize(self.mu, dim=1))
            self.conv1.reset_parameters()
            for weight in (self.conv1.weight, self.conv2[0].weight):
                assert isinstance(weight, Tensor)  # for the type checker
                weight.normal_(0, math.sqrt(2 / len(weight)))
        norm: Any = self.conv2[1]
        if hasattr(norm, "reset_parameters"):
            norm.reset_parameters()
        if self.zero_init:
            if not isinstance(getattr(norm, "weight", None), Tensor):
                raise ValueError(f"zero_init needs a norm_layer with a weight; got {type(norm).__name__}")
            nn.init.zeros_(norm.weight)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The unit's output for x; see the class. ``mask`` (B, *spatial) is True where a position takes part in EM.

        BatchNorm in training mode knows of no mask: to its statistics a masked position is one with out = 0.
        """
        check_unit_input(x, mask, self.channels, self.channel_dim, self._dtype)
        features, layout = flatten(x, self.channel_dim)  # (B, C, N)
        mu, z = expectation_maximization(*self._prepare(features, layout, mask), self.stages, self.gradient)
        y = residual(features, mu, z, self.conv2, self.final_relu, layout)  # relu(x + conv2(relu(mu zᵀ)))
        if self.training and self.decay < 1:
            self._move_bases(mu.detach(), z.detach())
        self._hand_out(z.detach(), layout)
        return y

    @property
    def _dtype(self) -> torch.dtype:
        return [*self.conv1.parameters(), self.mu][0].dtype  # not next(), which PyTorch 2.6 cannot trace

    def _starting_bases(self) -> Tensor:
        """The bases that EM starts from: the unit's, or where a forward is run again those that it started from."""
        if not self.training or is_tracing():
            return self.mu.clone() if self.training else self.mu  # a copy where _move_bases writes to the buffer
        if self._mu_before is None or not is_recomputing():
            self._mu_before = self.mu.clone()
        return self._mu_before

    def _prepare(self, x: Tensor, layout: Layout, mask: Tensor | None) -> tuple[Problem, Tensor]:
        """EM's problem on conv1(x) of x (B, C, N), and the bases (1, C', K) to start from."""
        x, mu = x.to(autocast_dtype(x)), self._starting_bases()
        if projection_form(self.conv1, x, self.num_bases, self.stages) == "folded":
            return prepare(x, mu, self.scale, mask, self.conv1.weight.flatten(1), self.conv1.bias)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.gradient != "none"):
            y = self.conv1(layout.image(x)).flatten(2)
        return prepare(y, mu, self.scale, mask, None, None)

    @torch.no_grad()
    def _move_bases(self, mu: Tensor, z: Tensor) -> None:
        """One step of the moving average towards the bases mu (B, C', K) that EM found; none where it runs again."""
        if is_recomputing():
            return
        old = self.mu.to(mu.dtype)
        average = _average_over_batch(mu, z)
        moved = unit_norm(torch.lerp(old, average, 1 - self.decay), fallback=old)
        assign_to_buffer(self, "mu", torch.where(average.isnan(), old, moved).to(self.mu.dtype))

    def _hand_out(self, z: Tensor, layout: Layout) -> None:
        """Gives the maps z (B, N, K) to whoever collects them; see :func:`collect_attention_maps`."""
        for maps, name in self.map_collectors:
            maps[name] = layout.restore_maps(z.mT)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: what belongs to a pass that is under way stays behind."""
        return {**self.__dict__, "map_collectors": [], "_mu_before": None}

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, num_bases={self.num_bases}, stages={self.stages}, inner_channels={self.inner_channels}, "
            f"decay={self.decay}, gradient={self.gradient!r}, scale={self.scale}, final_relu={self.final_relu}, "
            f"channel_dim={self.channel_dim}"
        )


def _average_over_batch(mu: Tensor, z: Tensor) -> Tensor:
    """The average (1, C', K) of the bases mu (B, C', K) over the batch, of all ranks; NaN where no batch is finite."""
    not_finite = z.sum(dtype=mu.dtype) * 0  # 0, or NaN: x that is not finite anywhere shows in the maps
    if not (dist.is_available() and dist.is_initialized()):
        return mu.mean(0, keepdim=True) + not_finite
    is_finite = not_finite == 0
    count = torch.where(is_finite, float(len(mu)), 0.0).to(mu.dtype)
    total = torch.where(is_finite, mu.sum(0, keepdim=True), 0.0)
    pooled = torch.cat([total.flatten(), count[None]])
    dist.all_reduce(pooled)
    return pooled[:-1].view_as(total) / pooled[-1]
