"""The Expectation-Maximization Attention Unit (EMAU) of Li et al., ICCV 2019, arXiv 1907.13426, section 3.3."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.module_tracker import ModuleTracker

from ema_attention import fast
from ema_attention.functional import (
    GradientMode,
    autocasts,
    check_mask,
    check_settings,
    expectation_maximization,
    is_channels_last,
    reconstruct,
    unit_norm,
)

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
    no basis. (BatchNorm's running statistics, here as everywhere, do become NaN.)

    Where activation checkpointing runs a forward again, it starts from the bases that the unit's last
    forward started from and moves nothing. (BatchNorm's running statistics move twice. And a unit that runs
    more than once before a backward is recomputed from its last start only; and one that torch.compile has
    compiled cannot tell: compile around the checkpoint, and allow graph breaks.)

    ``conv1`` is 1×1 and not run as a convolution: its weights are folded into the bases. (One with hooks,
    or replaced by a module of another kind, is run.) With ``gradient="none"`` no gradient can reach it, and
    it is frozen.

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
        norm_layer: makes the norm after conv2 from a number of channels; it gets (B, C, 1, N).
        zero_init: start the norm's weight at 0, so that a unit inserted into a trained network changes
            nothing at first (but for the last ReLU).
        final_relu: whether the last ReLU is there; turn it off in token models and pre-activation nets.
        channel_dim: where the channels are in the input; 1 for (B, C, \*spatial), -1 for tokens (B, N, C).
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
        for name, value in (("channels", channels), ("num_bases", num_bases), ("inner_channels", inner_channels)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int; got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be from 0 to 1; got {decay}")
        if isinstance(channel_dim, bool) or not isinstance(channel_dim, int):
            raise TypeError(f"channel_dim must be an int; got {type(channel_dim).__name__}")
        if channel_dim == 0:
            raise ValueError("channel_dim must not be 0, the batch dimension; got 0")
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
        self.map_collectors: list[tuple[dict[str, Tensor], str]] = []  # see collect_attention_maps
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
        """Attends; see the class. ``mask`` (B, *spatial) is True where a position takes part in EM.

        BatchNorm in training mode knows of no mask: to its statistics a masked position is one with out = 0.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a Tensor; got {type(x).__name__}")
        dim = self.channel_dim
        if x.dim() < 3 or not -x.dim() <= dim < x.dim() or dim % x.dim() == 0 or x.shape[dim] != self.channels:
            raise ValueError(
                f"x must have 3 dimensions or more and {self.channels} channels in dimension {dim}; "
                f"got {tuple(x.shape)}"
            )
        dtype = [*self.conv1.parameters(), self.mu][0].dtype
        if x.dtype != dtype and not (x.is_floating_point() and x.dtype != torch.float64 and autocasts(x.device)):
            raise TypeError(f"x must have the dtype of the unit, {dtype}; got {x.dtype}")
        channels_first = x.movedim(dim, 1)
        check_mask(mask, channels_first)
        spatial = channels_first.shape[2:]
        features = channels_first.flatten(2)  # (B, C, N)
        start = self.mu.clone()  # the buffer moves below, in place
        recomputes = False
        if self.training and not fast.is_tracing():
            if self._mu_before is not None and ModuleTracker().is_bw:  # checkpointing, in a backward
                recomputes, start = True, self._mu_before
            self._mu_before = start.detach()
        mu, z = self._attend(features, start, None if mask is None else mask.flatten(1))
        y = self._project(features, mu, z)
        if self.training and not recomputes:
            self._move_bases(mu.detach(), z.detach())
        for maps, name in self.map_collectors:
            maps[name] = z.detach().mT.unflatten(2, spatial)
        if not fast.is_tracing() and y.requires_grad and len(y) == 1:
            y.register_hook(_with_batch_stride)
        restored: Tensor = y.unflatten(2, spatial)
        return restored.movedim(1, dim)

    def _attend(self, x: Tensor, mu: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """EM on conv1(x), from bases mu: the bases (B, C', K) and maps (B, N, K)."""
        x, weight, bias = self.projected(x)
        return expectation_maximization(x, mu, self.stages, self.scale, self.gradient, mask, weight, bias)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """conv1(x) of x (B, C, N) as EM takes it: x, weight and bias; or where conv1 has to be run, what comes out."""
        conv = self.conv1
        if type(conv).forward is nn.Conv2d.forward and not fast.is_patched(conv):
            return x, conv.weight.flatten(1), conv.bias
        # what it does is known to itself alone
        return conv(x.unsqueeze(2)).squeeze(2), None, None

    def _project(self, x: Tensor, mu: Tensor, z: Tensor) -> Tensor:
        """The rest of the unit, relu(x + conv2(relu(mu zᵀ))), (B, C, N)."""
        # Any layout is (B, C, 1, N) to conv2. Not (B, C, N, 1): of channels-last memory [..., None] makes a
        # stride for which BatchNorm2d's gradient is wrong on a CPU (seen with PyTorch 2.15).
        if fast.stands_in_for(self.conv2, x):
            conv: Any = self.conv2[0]
            norm = self.conv2[1]
            if fast.is_foldable(norm) and not fast.differentiates(x, mu, z, *self.conv2.parameters()):
                return fast.inference_tail(x, mu, z, conv, norm, self.final_relu)
            y: Tensor = norm(fast.reconstruct_conv(mu, z, conv.weight.flatten(1), like=x).unsqueeze(2))
            if fast.is_plain(norm, nn.BatchNorm2d):
                y += x.unsqueeze(2)  # in place: nobody, its backward included, looks at its output
            else:
                y = y + x.unsqueeze(2)
        else:
            y = x.unsqueeze(2) + self.conv2(F.relu(reconstruct(mu, z, like=x)).unsqueeze(2))
        y = y.relu_() if self.final_relu else y
        return y.squeeze(2)

    @torch.no_grad()
    def _move_bases(self, mu: Tensor, z: Tensor) -> None:
        """One step of the moving average towards the bases mu (B, C', K) that a batch came to."""
        finite = z.sum().isfinite()  # x that is not finite anywhere shows in the maps
        total = torch.where(finite, mu.sum(0), 0.0)
        count = torch.where(finite, float(len(mu)), 0.0).to(mu.dtype)
        if dist.is_available() and dist.is_initialized():
            pooled = torch.cat([total.flatten(), count[None]])
            dist.all_reduce(pooled)
            total, count = pooled[:-1].view_as(total), pooled[-1]
        average = total / count.clamp_min(1)
        old = self.mu.to(mu.dtype)
        moved = unit_norm(self.decay * old + (1 - self.decay) * average, fallback=old)
        moved = torch.where(count > 0, moved, old).to(self.mu.dtype)
        if torch.compiler.is_compiling():
            # Not in place: a compiled backward may read the bases again (pytorch/pytorch#197039).
            self.mu = moved
        else:
            self.mu.copy_(moved)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: what belongs to a pass that is under way stays behind."""
        return {**self.__dict__, "map_collectors": [], "_mu_before": None}

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, num_bases={self.num_bases}, stages={self.stages}, inner_channels={self.inner_channels}, "
            f"decay={self.decay}, gradient={self.gradient!r}, scale={self.scale}, final_relu={self.final_relu}, "
            f"channel_dim={self.channel_dim}"
        )


def _with_batch_stride(grad: Tensor) -> Tensor:
    """A gradient (1, C, N) with the stride its batch dimension has in its layout.

    Views of a batch of one may have any, and BatchNorm2d's gradient is wrong on a CPU for some (PyTorch 2.15).
    """
    return grad[0].mT[None].mT if is_channels_last(grad) else grad[0][None]
