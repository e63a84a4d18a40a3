"""Expectation-Maximization attention as a function.

Li et al., "Expectation-Maximization Attention Networks for Semantic Segmentation", ICCV 2019,
arXiv 1907.13426, section 3.2. One stage of EM, from bases mu (the paper's μ) and features x (X)::

    E:  z  = softmax over the K bases of (scale · xᵀ mu)
    M:  mu = normalise(x z)                                  each basis to unit L2 norm

and, after the last stage, out = mu zᵀ. :func:`em_attention` is the public function; the steps below
it are what the whole, the sharded and the tiled computation share.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["EMAttention", "GradientMode", "em_attention"]

GradientMode = Literal["all", "last", "none"]
Gather: TypeAlias = Callable[[Tensor], Tensor]


class EMAttention(NamedTuple):
    """What :func:`em_attention` returns."""

    out: Tensor
    """(B, C', *spatial): the reconstruction of every position from the bases."""
    mu: Tensor
    """(B, C', K): the bases of each sample, unit L2 norm over the channels."""
    z: Tensor
    """(B, K, *spatial): the attention maps; the K values at a position sum to 1."""


def em_attention(
    x: Tensor,
    mu: Tensor,
    stages: int,
    *,
    scale: float = 1.0,
    gradient: GradientMode = "all",
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> EMAttention:
    """Expectation-Maximization attention: K bases found by EM explain every position.

    ``stages`` times, from the bases ``mu`` given::

        z  = softmax_k(scale · yᵀ mu)
        mu = normalise(y z)

    with y = x, or y = weight · x + bias where a ``weight`` is given (y is then never formed: the
    bases are taken to x instead, and the sums over x to y, which is exact). Then out = mu zᵀ, from the
    last bases and the last maps. A basis whose new direction is undefined (y z is zero or not finite)
    keeps its old direction, so that the bases returned always have unit norm. The E- and M-steps are
    float32 or wider, whatever the dtypes are and whether or not autocast is on; mu zᵀ is in x's dtype.

    Args:
        x: features, (B, C, *spatial) with one spatial dimension or more.
        mu: the bases to start from, (C', K), (1, C', K) or (B, C', K); no column may be zero. They are
            used as they are, so they should have unit norm. C' is C where no weight is given.
        stages: number of EM stages, at least 1.
        scale: sharpness of the E-step (the paper's λ), positive.
        gradient: ``"all"`` differentiates through every stage; ``"last"`` through the last one, taking
            the bases that enter it as constants (the one-step gradient of Geng et al., ICLR 2021,
            arXiv 2109.04553); ``"none"`` takes bases and maps as constants, as the paper's code does,
            so no gradient passes at all.
        mask: (B, *spatial), bool, True where a position takes part. One that does not moves no basis,
            and its ``out`` and ``z`` are 0, whatever x holds there.
        weight: (C', C), the projection into the space that is attended in.
        bias: (C',), its bias; only together with ``weight``.

    Returns:
        ``(out, mu, z)``: out (B, C', *spatial) and z (B, K, *spatial) in x's dtype, mu (B, C', K) in its
        own. ``out`` is laid out in memory as x is. A sample of x that is not finite has NaN in its own
        ``out`` and ``z`` and nowhere else.

    Raises:
        TypeError: for a tensor that is not floating point, a mask that is not bool, a ``stages`` that
            is not an int.
        ValueError: for shapes or devices that do not fit each other, ``stages`` below 1, ``scale`` not
            positive and finite, an unknown ``gradient``.

    Example:
        >>> x = torch.randn(2, 16, 8, 8)
        >>> mu = torch.nn.functional.normalize(torch.randn(16, 4), dim=0)
        >>> out, mu, z = em_attention(x, mu, 3)
        >>> out.shape, mu.shape, z.shape
        (torch.Size([2, 16, 8, 8]), torch.Size([2, 16, 4]), torch.Size([2, 4, 8, 8]))
    """
    check_arguments(x, mu, stages, scale, gradient, mask, weight, bias)
    return attend(x, mu, stages, scale, gradient, mask, weight, bias)


def run_stages(
    x: Tensor,
    mu: Tensor,
    stages: int,
    scale: float,
    mask: Tensor | None = None,
    projection: Tensor | None = None,
    gather: Gather | None = None,
) -> tuple[Tensor, Tensor]:
    """EM itself: the bases (B, C', K) and maps (B, N, K) after ``stages`` stages on x (B, C, N) from mu (B, C', K)."""
    from ema_attention import fast  # here, because the fast path is built from the steps below

    if gather is None and fast.differentiates(x, mu, projection):
        return fast.run_stages(x, mu, stages, scale, mask, projection)
    x = x.to(mu.dtype)
    for _ in range(stages):
        z = expectation(x, mu, scale, mask, projection)
        sums = statistics(x, z)
        mu = maximization(sums if gather is None else gather(sums), mu, projection)
    return mu, z


def expectation(
    x: Tensor, mu: Tensor, scale: float, mask: Tensor | None = None, projection: Tensor | None = None
) -> Tensor:
    """E-step: the maps z (B, N, K) of x (B, C, N) for bases mu (B, C', K)."""
    bases = scale * mu
    if projection is None:
        logits = x.mT @ bases  # (B, N, K)
    else:
        bases = projection.mT @ bases  # yᵀmu = xᵀ(Wᵀmu) + bᵀmu
        logits = torch.baddbmm(bases[:, -1:], x.mT, bases[:, :-1])
    z = logits.softmax(-1)
    return z if mask is None else z.masked_fill(~mask[..., None], 0.0)


def statistics(x: Tensor, z: Tensor) -> Tensor:
    """What the M-step needs of the positions, (B, C + 1, K): Σ_n x_n z_n and, in the last row, Σ_n z_n.

    They add up over any split of the positions into tiles or ranks.
    """
    return torch.cat([x @ z, z.sum(1, keepdim=True)], 1)


def maximization(sums: Tensor, mu: Tensor, projection: Tensor | None = None) -> Tensor:
    """M-step: the unit-norm bases (B, C', K) from the :func:`statistics`; ``mu`` are the bases before it."""
    direction = sums[:, :-1] if projection is None else projection @ sums  # Σ y z = W Σ x z + b Σ z
    return unit_norm(direction, fallback=mu)


def unit_norm(direction: Tensor, fallback: Tensor) -> Tensor:
    """Each column of ``direction`` (..., C, K) to unit L2 norm; of ``fallback`` where it is zero or not finite."""
    peak = direction.detach().abs().amax(-2, keepdim=True)
    defined = (peak >= torch.finfo(peak.dtype).tiny) & peak.isfinite()
    direction = torch.where(defined, direction, fallback)
    # The squares of a norm over- and underflow long before the values do: bring the largest to 1 first.
    peak = direction.detach().abs().amax(-2, keepdim=True).clamp_min(torch.finfo(peak.dtype).tiny)
    return F.normalize(direction / peak, dim=-2)


def reconstruct(mu: Tensor, z: Tensor, like: Tensor) -> Tensor:
    """The product mu zᵀ (B, C', N) of mu (B, C', K) and z (B, N, K), in the dtype and memory layout of ``like``."""
    mu, z = mu.to(like.dtype), z.to(like.dtype)
    with without_autocast(like.device):
        return (z @ mu.mT).mT if is_channels_last(like) else mu @ z.mT


def attend(
    x: Tensor,
    mu: Tensor,
    stages: int,
    scale: float,
    gradient: GradientMode,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gather: Gather | None = None,
) -> EMAttention:
    """:func:`em_attention` of checked arguments; ``gather`` completes the statistics of positions held elsewhere."""
    features = x.flatten(2)  # (B, C, N)
    positions = None if mask is None else mask.flatten(1)  # (B, N)
    bases, z = expectation_maximization(features, mu, stages, scale, gradient, positions, weight, bias, gather)
    return restore(features, x.shape[2:], mu, bases, z)


def restore(x: Tensor, spatial: torch.Size, mu: Tensor, bases: Tensor, z: Tensor) -> EMAttention:
    """The result for x (B, C, N) and mu as they were given, from bases (B, C', K) and maps (B, N, K)."""
    out = reconstruct(bases, z, like=x).unflatten(2, spatial)
    return EMAttention(out, bases.to(mu.dtype), z.to(x.dtype).mT.unflatten(2, spatial))


def expectation_maximization(
    x: Tensor,
    mu: Tensor,
    stages: int,
    scale: float = 1.0,
    gradient: GradientMode = "all",
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gather: Gather | None = None,
) -> tuple[Tensor, Tensor]:
    """The bases (B, C', K) and maps (B, N, K) of x (B, C, N) after ``stages`` stages, float32 or wider."""
    x, mu, projection = prepare(x, mu, mask, weight, bias)
    run = partial(run_stages, scale=scale, mask=mask, gather=gather)
    with without_autocast(x.device):
        if gradient == "all":
            return run(x, mu, stages, projection=projection)
        mu = mu.detach()
        constant = None if projection is None else projection.detach()
        if gradient == "none":
            return run(x.detach(), mu, stages, projection=constant)
        if stages > 1:
            mu, _ = run(x.detach(), mu, stages - 1, projection=constant)
        return run(x, mu, 1, projection=projection)


def prepare(
    x: Tensor, mu: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The form that EM runs in: x 0 where masked, mu (B, C', K), the projection [weight | bias] (C', C + 1).

    mu and the projection are float32 or wider.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, mu.dtype), torch.float32)
    if mask is not None:
        x = x.masked_fill(~mask[:, None], 0.0)  # NaN · 0 would leak out of a padded position
    mu = (mu if mu.dim() == 3 else mu[None]).to(dtype).expand(x.shape[0], -1, -1)
    if weight is None:
        return x, mu, None
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return x, mu, torch.cat([weight.to(dtype), bias.to(dtype)[:, None]], 1)


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of x (B, C, N) lie next to each other in memory."""
    return x.stride(1) < x.stride(2)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for the device; the meta device has none, and does not say so but raises."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(device.type, enabled=False) if autocasts(device) else contextlib.nullcontext()


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
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor; got {type(tensor).__name__}")
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
        raise ValueError(
            f"mu must be (C', K), (1, C', K) or (B, C', K) with C' = {channels}, B = {batch} and K at least 1; "
            f"got {tuple(mu.shape)}"
        )
    for name, tensor in (("x", x), ("mu", mu), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be of a real floating point dtype; got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}; got {tensor.device}")
    check_mask(mask, x)


def check_mask(mask: Tensor | None, x: Tensor) -> None:
    """Raises if ``mask`` is not a bool tensor over the positions of x (B, C, *spatial)."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a Tensor; got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True where a position takes part; got {mask.dtype}")
    if mask.device != x.device:
        raise ValueError(f"mask must be on the device of x, {x.device}; got {mask.device}")
    if mask.shape != x.shape[:1] + x.shape[2:]:
        raise ValueError(f"mask must be (B, *spatial) = {tuple(x.shape[:1] + x.shape[2:])}; got {tuple(mask.shape)}")


def check_settings(stages: int, scale: float, gradient: str) -> None:
    """Raises for the settings that :func:`em_attention` and ``EMAUnit`` share."""
    if isinstance(stages, bool) or not isinstance(stages, int):
        raise TypeError(f"stages must be an int; got {type(stages).__name__}")
    if stages < 1:
        raise ValueError(f"stages must be at least 1; got {stages}")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a float; got {type(scale).__name__}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be positive and finite; got {scale}")
    if gradient not in get_args(GradientMode):
        raise ValueError(f"gradient must be one of {get_args(GradientMode)}; got {gradient!r}")
