"""Expectation-Maximization attention as a function.

Li et al., "Expectation-Maximization Attention Networks for Semantic Segmentation", ICCV 2019,
arXiv 1907.13426, section 3.2. The steps of EM stand in ``_steps``.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from torch import Tensor

from ema_attention._checks import GradientMode, check_arguments
from ema_attention._forms import has_one_product
from ema_attention._layout import Layout, flatten
from ema_attention._stages import run_with_one_product
from ema_attention._steps import Problem, Reduce, prepare, reconstruct, run
from ema_attention._torch import without_autocast

__all__ = ["EMAttention", "GradientMode", "em_attention"]


class EMAttention(NamedTuple):
    """What :func:`em_attention` returns."""

    out: Tensor
    """(B, C', *spatial): the reconstruction of every position from the bases."""
    mu: Tensor
    """(B, C', K): the bases of each sample, unit L2 norm over the channels."""
    z: Tensor
    """(B, K, *spatial): the attention maps; the K values at a position sum to 1, or are 0 where it is masked."""


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
    keeps its old direction, so that the bases returned always have unit norm. The softmax, the norms and the
    sums are float32 or wider, whether or not autocast is on. The products with x run in x's dtype where that
    is as good, which bfloat16 is, and in float32 or wider elsewhere; mu zᵀ is in x's dtype.

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
        TypeError: for what is no tensor, or one that is not floating point, a mask that is not bool, a ``stages``
            that is not an int, a ``scale`` that is no number.
        ValueError: for shapes or devices that do not fit each other, ``stages`` below 1, ``scale`` not
            positive and finite, an unknown ``gradient``.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 16, 8, 8)
        >>> mu = torch.nn.functional.normalize(torch.randn(16, 4), dim=0)
        >>> out, mu, z = em_attention(x, mu, 3)
        >>> out.shape, mu.shape, z.shape
        (torch.Size([2, 16, 8, 8]), torch.Size([2, 16, 4]), torch.Size([2, 4, 8, 8]))
    """
    check_arguments(x, mu, stages, scale, gradient, mask, weight, bias)
    features, layout = flatten(x)
    problem, start = prepare(features, mu, scale, mask, weight, bias)
    bases, z = expectation_maximization(problem, start, stages, gradient)
    return reconstruction(features, layout, bases.to(mu.dtype), z)


def expectation_maximization(
    problem: Problem, mu: Tensor, stages: int, gradient: GradientMode, reduce: Reduce | None = None
) -> tuple[Tensor, Tensor]:
    """The bases (B, C', K) and maps (B, N, K) after ``stages`` stages from bases mu (B, C', K).

    ``reduce`` completes the sums of a stage with those of positions that are held elsewhere.
    """
    with without_autocast(problem.x.device):
        if gradient == "none":
            problem, mu = problem.detach(), mu.detach()
        if gradient == "last":
            if stages > 1:
                mu, _ = _run(problem.detach(), mu.detach(), stages - 1, reduce)
            mu, stages = mu.detach(), 1
        return _run(problem, mu, stages, reduce)


def _run(problem: Problem, mu: Tensor, stages: int, reduce: Reduce | None) -> tuple[Tensor, Tensor]:
    if reduce is None and has_one_product(problem.x, mu, problem.projection):
        return run_with_one_product(problem, mu, stages)
    last = deque(run(problem, mu, stages, reduce), maxlen=1).pop()
    return last.mu, last.z


def reconstruction(x: Tensor, layout: Layout, mu: Tensor, z: Tensor) -> EMAttention:
    """The result for x (B, C, N), from bases (B, C', K) and maps (B, N, K)."""
    z = z.to(x.dtype)
    return EMAttention(layout.restore(reconstruct(mu, z, like=x)), mu, layout.restore_maps(z.transpose(1, 2)))
