"""The Expectation-Maximization Attention Unit (EMAU) of Li et al., ICCV 2019, arXiv 1907.13426, section 3.3."""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ema_attention._average import average_over_batch, average_over_ranks
from ema_attention._checks import (
    GradientMode,
    check_decay,
    check_group,
    check_no_vmap,
    check_positive_integers,
    check_settings,
    check_unit_input,
    check_unit_settings,
    make_module,
)
from ema_attention._convolution import convolve
from ema_attention._forms import is_pointwise, projection_form
from ema_attention._layout import Layout, flatten
from ema_attention._recomputation import Starts, outside_selective_checkpoint
from ema_attention._residual import residual
from ema_attention._steps import Problem, prepare, unit_norm
from ema_attention._torch import (
    autocast_dtype,
    call_as_leaf,
    give_zero_gradient,
    is_compiling,
    is_distributed,
    is_in_backward,
    is_tracing,
    is_transformed,
    snapshot,
)
from ema_attention.functional import expectation_maximization

__all__ = ["EMAUnit"]


class MapCollector(NamedTuple):
    """Where a unit leaves its maps; see :func:`collect_attention_maps`."""

    maps: dict[str, Tensor]
    name: str
    thread: int


class EMAUnit(nn.Module):
    r"""Expectation-Maximization attention as a residual layer: same shape in and out, for any layout.

    ::

        y = relu(x + norm(conv2(relu(em_attention(conv1(x), mu, stages).out))))

    See :func:`em_attention` for the attention. The bases it starts from are the buffer ``mu``
    (1, C', K), a moving average over what EM found: each forward in training mode moves it, and eval
    leaves it alone. The new bases are averaged over the samples of the batch, then
    ``mu = normalise(decay · mu + (1 - decay) · average)``. A batch that is not finite moves no basis. (BatchNorm's
    running statistics, here as everywhere, do become NaN.) With ``decay=1`` the buffer never changes.

    Where torch.distributed is initialised, each forward in training mode sums C'·K + 1 numbers over the ranks, so
    that they all hold the same bases. As with SyncBatchNorm, every rank of ``process_group`` has to run that forward
    equally often. With ``sync_bases=False``, with ``decay=1`` and in eval nothing is communicated.

    Where activation checkpointing runs a forward again, it starts from the bases that this forward started
    from and moves nothing. (BatchNorm's running statistics move twice. A unit that torch.compile has compiled
    cannot tell: compile around the checkpoint, and allow graph breaks.)

    Where there are many positions, and in compiled code, ``conv1`` is not run, except on CUDA: its weights are folded
    into the bases, which gives the same function for less. Where a CPU is faster at products, each convolution runs
    as a matrix product. (A module with hooks of its own, or of another kind, is always called.) See
    :func:`plain_form`.

    Parameter names and shapes are those of the published EMANet weights.

    Args:
        channels: C, of the input and the output.
        num_bases: K.
        stages: EM stages T.
        inner_channels: C', the width of the space attended in; ``None`` for ``channels``, as published.
        decay: weight of the old bases in the moving average, from 0 to 1 (the paper's momentum 0.9; not
            BatchNorm's momentum, which weighs the new).
        gradient: what is differentiated; see :func:`em_attention`. ``"none"`` is the paper: no gradient can reach
            conv1, and it is frozen. It can be set later, which freezes conv1 or makes it trainable.
        scale: sharpness of the E-step.
        norm_layer: makes the norm after conv2 from a number of channels; it gets (B, C, H, W).
            BatchNorm gets (B, C, 1, N), as any does where x is no image.
        layer_scale: the initial weight γ of the norm: by how much the attention counts beside x at first, as in
            LayerScale (Touvron et al., ICCV 2021). 1 as published; with 0 a unit inserted into a trained network
            changes nothing until training moves it (but for the last ReLU).
        final_relu: whether the last ReLU is there; turn it off in token models and pre-activation nets, and where an
            addition follows (timm's ``attn_layer``): one in place overwrites what the ReLU needs for its gradient.
        channel_dim: where the channels are in the input; 1 for (B, C, \*spatial), -1 for (B, N, C) and (B, H, W, C).
        sync_bases: whether the new bases are averaged over ranks, too. (DistributedDataParallel copies rank 0's buffers
            to all ranks unless it has ``broadcast_buffers=False``.)
        process_group: the ranks; ``None`` for all.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Shape:
        x (B, C, \*spatial), or with the channels at ``channel_dim``; the output has x's shape and dtype,
        and its memory layout: contiguous stays contiguous and ``channels_last`` ``channels_last`` (but a
        ``channel_dim`` in the middle makes a view).

    Raises:
        TypeError, ValueError: in the constructor for settings that make no sense; in ``forward`` for a
            shape that does not fit.
        RuntimeError: in a forward that activation checkpointing runs again, where nothing tells what it started from.

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
        layer_scale: float = 1.0,
        final_relu: bool = True,
        channel_dim: int = 1,
        sync_bases: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_settings(stages, scale, gradient)
        inner_channels = channels if inner_channels is None else inner_channels
        check_positive_integers(channels=channels, num_bases=num_bases, inner_channels=inner_channels)
        check_unit_settings(decay, layer_scale, channel_dim, torch.get_default_dtype() if dtype is None else dtype)
        check_group("process_group", process_group)
        self.channels = channels
        self.num_bases = num_bases
        self.stages = stages
        self.inner_channels = inner_channels
        self.decay = decay
        self.scale = scale
        self.layer_scale = layer_scale
        self.final_relu = final_relu
        self.channel_dim = channel_dim
        self.sync_bases = sync_bases
        self.process_group = process_group
        self.register_buffer("mu", torch.empty(1, inner_channels, num_bases, device=device, dtype=dtype))
        self.conv1 = nn.Conv2d(channels, inner_channels, 1, device=device, dtype=dtype)
        self.conv2 = nn.Sequential(
            nn.Conv2d(inner_channels, channels, 1, bias=False, device=device, dtype=dtype),
            make_module("norm_layer", norm_layer, channels),
        )
        if device is not None or dtype is not None:
            self.conv2[1].to(device=device, dtype=dtype)
        self.map_collectors: list[MapCollector] = []  # of collect_attention_maps
        self._starts = Starts()
        self._is_compiled = False  # nothing reads it: see _starting_bases
        self.gradient = gradient
        self.reset_parameters()

    @property
    def gradient(self) -> GradientMode:
        """What is differentiated: ``"all"``, ``"last"`` or ``"none"``; conv1 is trained unless it is ``"none"``.

        Raises:
            ValueError: for another.
        """
        return self._gradient

    @gradient.setter
    def gradient(self, gradient: GradientMode) -> None:
        check_settings(self.stages, self.scale, gradient)
        self.conv1.requires_grad_(gradient != "none")
        self._gradient: GradientMode = gradient

    def reset_parameters(self) -> None:
        """Draws the bases and the convolutions anew, and resets the norm, whose weight becomes ``layer_scale``.

        As published: N(0, √(2/K)), then unit norm, for the bases; N(0, √(2/C_out)) for the convolutions. Code that
        resets every module of a model, parents first, does so again in PyTorch's way to the unit's convolutions and
        norm: call this once more after it.

        Raises:
            ValueError: for a ``layer_scale`` other than 1, if the norm has no parameter that is its weight.
        """
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
        if self.layer_scale != 1:
            if not isinstance(getattr(norm, "weight", None), nn.Parameter):
                raise ValueError(
                    f"layer_scale needs a norm_layer whose weight is a parameter; got {type(norm).__name__}"
                )
            nn.init.constant_(norm.weight, self.layer_scale)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The unit's output for x; see the class. ``mask`` (B, *spatial) is True where a position takes part in EM.

        BatchNorm in training mode knows of no mask: to its statistics a masked position is one with out = 0.
        """
        if isinstance(x, fx.Proxy) and x.tracer.root is not self:
            return call_as_leaf(self, x, mask)
        check_settings(self.stages, self.scale, self.gradient)  # which may have been set since, as decay may
        check_decay(self.decay)
        check_unit_input(x, mask, self.channels, self.channel_dim, self._dtype)
        features, layout = flatten(x, self.channel_dim)  # (B, C, N)
        start, moves = self._starting_bases(features)
        mu, z = expectation_maximization(*self._prepare(features, layout, mask, start), self.stages, self.gradient)
        y = residual(features, mu, z, self.conv2, self.final_relu, layout)  # relu(x + conv2(relu(mu zᵀ)))
        if moves:
            with outside_selective_checkpoint():
                self._move_bases(mu.detach(), z.detach())
        self._hand_out(z.detach(), layout)
        return y if self.gradient != "none" else self._without_gradient_of_conv1(y)

    @property
    def _dtype(self) -> torch.dtype:
        return [*self.conv1.parameters(), self.mu][0].dtype  # not next(), which PyTorch 2.6 cannot trace

    def _starting_bases(self, x: Tensor) -> tuple[Tensor, bool]:
        """The bases that EM of x (B, C, N) starts from, and whether the unit's move after it."""
        if not self.training or self.decay == 1:
            # A later forward in training mode writes to the buffer, of which a backward needs what it holds now.
            keeps = self.gradient != "none" and torch.is_grad_enabled() and not is_tracing()
            return (self.mu.clone() if keeps else self.mu), False
        if is_compiling():
            # An attribute that is set makes torch.compile leave a checkpoint around the unit to eager mode. In a graph
            # of its own the second forward would copy the buffer when it has moved.
            self._is_compiled = True
            return snapshot(self.mu), True
        with outside_selective_checkpoint():
            start = self._starts.find(x) if is_in_backward() else None
            if start is not None:  # a forward that is run again
                return start, False
            start = self.mu.clone()  # _move_bases writes to the buffer
            self._starts.keep(x, start)
            return start, True

    def _prepare(self, x: Tensor, layout: Layout, mask: Tensor | None, mu: Tensor) -> tuple[Problem, Tensor]:
        """EM's problem on conv1(x) of x (B, C, N), and the bases mu (1, C', K) to start from."""
        x = x.to(autocast_dtype(x))
        form = projection_form(self.conv1, x, self.num_bases, self.stages)
        if form == "folded":
            return prepare(x, mu, self.scale, mask, self.conv1.weight.flatten(1), self.conv1.bias)
        if mask is not None:
            x = x.masked_fill(~mask.flatten(1)[:, None], 0.0)  # NaN · 0 would come into the gradient of conv1
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.gradient != "none"):
            if form == "multiplied":
                y = convolve(self.conv1.weight.flatten(1), x, self.conv1.bias)  # autocast casts them as conv1's own
            else:
                y = self.conv1(layout.row(x) if is_pointwise(self.conv1) else layout.image(x)).flatten(2)
        return prepare(y, mu, self.scale, mask, None, None)

    @torch.no_grad()
    def _move_bases(self, mu: Tensor, z: Tensor) -> None:
        """One step of the moving average towards the bases mu (B, C', K) that EM found."""
        old = self.mu.to(mu.dtype)
        is_synced = self.sync_bases and is_distributed()
        average = average_over_ranks(mu, z, self.process_group) if is_synced else average_over_batch(mu, z)
        moved = unit_norm(torch.lerp(old, average, 1 - self.decay), fallback=old, may_round=False)
        self.mu.copy_(torch.where(average.isnan(), old, moved))

    def _without_gradient_of_conv1(self, y: Tensor) -> Tensor:
        """The output y, and a warning if conv1 was made trainable since: its gradient is 0."""
        if not torch.is_grad_enabled() or is_transformed():
            return y
        unfrozen = [p for p in self.conv1.parameters() if p.requires_grad]
        if not unfrozen:
            return y
        if not is_tracing():
            warnings.warn(
                "EMAUnit with gradient='none' does not train conv1, which has parameters that require a gradient: set "
                "unit.gradient = 'all', or freeze them by unit.conv1.requires_grad_(False)",
                stacklevel=5,
            )
        return give_zero_gradient(y, unfrozen)

    def _hand_out(self, z: Tensor, layout: Layout) -> None:
        """Gives the maps z (B, N, K) to whoever collects them; see :func:`collect_attention_maps`."""
        for maps, name, thread in self.map_collectors:
            if is_tracing() or thread == threading.get_ident():
                check_no_vmap("collect_attention_maps")
                maps[name] = layout.restore_maps(z.transpose(1, 2))

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without what belongs to a pass that is under way, and what ``compile()`` made."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "map_collectors": [], "_starts": Starts()}

    def __deepcopy__(self, memo: dict[int, Any]) -> EMAUnit:
        memo[id(self.process_group)] = self.process_group  # a group cannot be copied, and the copy belongs to the same
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        state = EMAUnit.__getstate__(self)  # not that of a parametrized class, which refuses
        copied.__setstate__(copy.deepcopy(state, memo))  # type: ignore[no-untyped-call]
        return copied

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, num_bases={self.num_bases}, stages={self.stages}, inner_channels={self.inner_channels}, "
            f"decay={self.decay}, gradient={self.gradient!r}, scale={self.scale}, layer_scale={self.layer_scale}, "
            f"final_relu={self.final_relu}, channel_dim={self.channel_dim}, sync_bases={self.sync_bases}"
        )
