"""Every error for arguments that make no sense: one sentence, with what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ema_attention._layout import move_dimension
from ema_attention._torch import autocasts, is_vmapped

GradientMode = Literal["all", "last", "none"]
"""What of EM is differentiated: every stage, the last one, or nothing."""
GRADIENT_MODES = get_args(GradientMode)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_arguments(
    x: Tensor,
    mu: Tensor,
    stages: int,
    scale: float,
    gradient: str,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    check_settings(stages, scale, gradient)
    for name, tensor in (("x", x), ("mu", mu), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_tensor(name, tensor)
    if x.dim() < 3 or x.shape[1] < 1:
        raise ValueError(f"x must be (B, C, *spatial) with C at least 1; got {tuple(x.shape)}")
    batch, channels = x.shape[:2]
    if bias is not None and weight is None:
        raise ValueError("bias needs a weight to go with; got weight=None")
    if weight is not None:
        if weight.dim() != 2 or weight.shape[1] != channels:
            raise ValueError(f"weight must be (C', C) with C = {channels} as in x; got {tuple(weight.shape)}")
        channels = weight.shape[0]
        if bias is not None and bias.shape != (channels,):
            raise ValueError(f"bias must be (C',) = ({channels},) as in weight; got {tuple(bias.shape)}")
    if (
        mu.dim() not in (2, 3)
        or mu.shape[-2] != channels
        or mu.shape[-1] < 1
        or mu.shape[:-2] not in ((), (1,), (batch,))
    ):
        are_tokens = weight is None and x.dim() == 3 and mu.dim() > 1 and mu.shape[-2] == x.shape[2]
        raise ValueError(
            f"mu must be (C', K), (1, C', K) or (B, C', K) with C' = {channels}, B = {batch} and K at least 1; "
            f"got {tuple(mu.shape)}" + (" (tokens (B, N, C) are x.mT here)" if are_tokens else "")
        )
    for name, tensor in (("x", x), ("mu", mu), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        check_dtype(name, tensor.dtype)
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}; got {tensor.device}")
    check_mask(mask, x)


def check_mask(mask: Tensor | None, x: Tensor) -> None:
    """Raises if ``mask`` is not a bool tensor over the positions of x (B, C, *spatial)."""
    if mask is None:
        return
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True where a position takes part; got {mask.dtype}")
    if mask.device != x.device:
        raise ValueError(f"mask must be on the device of x, {x.device}; got {mask.device}")
    if mask.shape != x.shape[:1] + x.shape[2:]:
        raise ValueError(f"mask must be (B, *spatial) = {tuple(x.shape[:1] + x.shape[2:])}; got {tuple(mask.shape)}")


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor; got {type(value).__name__}")


def check_settings(stages: int, scale: float, gradient: str) -> None:
    """Raises for the settings that :func:`em_attention` and ``EMAUnit`` share."""
    check_positive_integers(stages=stages)
    check_number("scale", scale)
    if not 0 < scale < math.inf:  # torch.compile has no isfinite of a float that varies
        raise ValueError(f"scale must be positive and finite; got {scale}")
    if gradient not in GRADIENT_MODES:
        raise ValueError(f"gradient must be one of {GRADIENT_MODES}; got {gradient!r}")


def check_positive_integers(**values: object) -> None:
    for name, value in values.items():
        check_integer(name, value)
        if value < 1:  # type: ignore[operator]
            raise ValueError(f"{name} must be at least 1; got {value}")


def check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")


def check_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {type(value).__name__}")


def check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {dtype}")


def check_decay(decay: float) -> None:
    check_number("decay", decay)
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be from 0 to 1; got {decay}")


def check_unit_settings(decay: float, layer_scale: float, channel_dim: int, dtype: torch.dtype) -> None:
    check_decay(decay)
    check_number("layer_scale", layer_scale)
    if not (math.isfinite(layer_scale) and layer_scale >= 0):
        raise ValueError(f"layer_scale must be finite and at least 0; got {layer_scale}")
    check_integer("channel_dim", channel_dim)
    if channel_dim == 0:
        raise ValueError("channel_dim must not be 0, the batch dimension; got 0")
    check_dtype("dtype", dtype)


def make_module(name: str, make: Callable[[int], nn.Module], channels: int) -> nn.Module:
    """What ``make`` makes for so many channels; raises where that is no module."""
    if not callable(make):
        raise TypeError(f"{name} must make a module from a number of channels; got {type(make).__name__}")
    module = make(channels)
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} must make a module from a number of channels; it made a {type(module).__name__}")
    return module


def check_no_vmap(name: str) -> None:
    if is_vmapped():
        raise ValueError(f"{name} must see whole batches; got a model under torch.vmap, where each sample stands alone")


def check_group(name: str, group: object) -> None:
    """Raises for what is no group of this rank, such as what torch.distributed.new_group gives to a rank outside it."""
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise ValueError(f"{name} must be a process group with this rank in it, or None; got {group!r}")


def _hint(x: Tensor, channels: int) -> str:
    """What a user may have meant by an x that has its channels elsewhere."""
    if x.dim() > 2 and x.shape[-1] == channels:
        return " (tokens and other inputs whose channels come last need channel_dim=-1)"
    if x.dim() > 2 and x.shape[1] == channels:
        return " (images need channel_dim=1)"
    return " (a single sample needs a batch dimension: x[None])" if x.dim() > 1 and len(x) == channels else ""


def check_unit_input(x: Tensor, mask: Tensor | None, channels: int, channel_dim: int, dtype: torch.dtype) -> None:
    """Raises for an input that a unit for ``channels`` in ``channel_dim``, with parameters of ``dtype``, refuses."""
    check_tensor("x", x)
    check_integer("channel_dim", channel_dim)
    dims = x.dim()
    if dims < 3 or not -dims <= channel_dim < dims or channel_dim % dims == 0 or x.shape[channel_dim] != channels:
        raise ValueError(
            f"x must have 3 dimensions or more and {channels} channels in dimension {channel_dim}; got {tuple(x.shape)}"
            + _hint(x, channels)
        )
    if x.dtype != dtype and not (x.dtype in DTYPES and x.dtype != torch.float64 and autocasts(x.device)):
        raise TypeError(f"x must have the dtype of the unit, {dtype}; got {x.dtype}")
    check_mask(mask, move_dimension(x, channel_dim, 1))
