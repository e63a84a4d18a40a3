"""The ground that everything stands on: what EM explains, its two steps, and the sums between them.

Notation of the paper (Li et al., ICCV 2019, arXiv 1907.13426, section 3.2): X is x, μ is mu, Z is z. One stage is

    E:  z  = softmax over the K bases of (scale · yᵀ mu)
    M:  mu = normalise(y z)                                  each basis to unit L2 norm

with y = x, or y = W x + b, which is never formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ema_attention._layout import is_channels_last
from ema_attention._torch import without_autocast

Gather: TypeAlias = Callable[[Tensor], Tensor]
"""Completes the sums of the positions held here with those of positions held elsewhere."""


class Problem(NamedTuple):
    """What the bases are to explain: y at the positions that take part."""

    x: Tensor
    """(B, C, N), 0 where a position does not take part."""
    absent: Tensor | None
    """(B, N, 1), True where a position does not take part."""
    projection: Tensor | None
    """[W | b], (C', C + 1), of y = W x + b."""
    scale: float

    def detach(self) -> Problem:
        """The same with nothing to differentiate."""
        return self._replace(
            x=self.x.detach(), projection=None if self.projection is None else self.projection.detach()
        )


def pose(
    x: Tensor, mu: Tensor, scale: float, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Problem, Tensor]:
    """The problem of x (B, C, N) and mask (B, N), and the bases mu to start from as (B, C', K).

    The bases and the projection are float32 or wider.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, mu.dtype), torch.float32)
    absent = None if mask is None else ~mask[..., None]
    if absent is not None:
        x = x.masked_fill(absent.mT, 0.0)  # NaN · 0 would leak out of a padded position
    projection = None
    if weight is not None:
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        projection = torch.cat([weight.to(dtype), bias.to(dtype)[:, None]], 1)
    mu = (mu if mu.dim() == 3 else mu[None]).to(dtype).expand(x.shape[0], -1, -1)
    return Problem(x, absent, projection, scale), mu


class Stage(NamedTuple):
    """What one stage of EM makes."""

    mu: Tensor
    """(B, C', K): the bases after it, unit L2 norm."""
    z: Tensor
    """(B, N, K): the maps, from the bases before it."""
    sums: Tensor
    """(B, C + 1, K): see :func:`statistics`."""


def run(problem: Problem, mu: Tensor, stages: int, gather: Gather | None = None) -> Iterator[Stage]:
    """EM: so many stages on ``problem`` from bases mu (B, C', K)."""
    problem = problem._replace(x=problem.x.to(mu.dtype))
    for _ in range(stages):
        z = expectation(problem, mu)
        sums = statistics(problem, z)
        if gather is not None:
            sums = gather(sums)
        mu = maximization(problem, sums, mu)
        yield Stage(mu, z, sums)


def expectation(problem: Problem, mu: Tensor) -> Tensor:
    """E-step: the maps z (B, N, K) for bases mu (B, C', K)."""
    z = logits(problem, mu).softmax(-1)
    return z if problem.absent is None else z.masked_fill(problem.absent, 0.0)


def expectation_backward(z: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the E-step's logits (B, N, K), from its maps and their gradient."""
    z_grad = z * grad  # which is 0 where a position is absent
    return z_grad - z * z_grad.sum(-1, keepdim=True)


def logits(problem: Problem, mu: Tensor) -> Tensor:
    """The products scale · yᵀ mu (B, N, K)."""
    bases = project(problem, mu)
    if problem.projection is None:
        return problem.x.mT @ bases
    return torch.baddbmm(bases[:, -1:], problem.x.mT, bases[:, :-1])


def project(problem: Problem, mu: Tensor) -> Tensor:
    """The bases that x is compared with, (B, C, K), for bases mu (B, C', K) that y = W x + b is compared with.

    yᵀ mu = xᵀ (Wᵀ mu) + bᵀ mu: where there is a projection, bᵀ mu is one row more, the last.
    """
    bases = problem.scale * mu
    return bases if problem.projection is None else problem.projection.mT @ bases


def statistics(problem: Problem, z: Tensor) -> Tensor:
    """What the M-step needs of the positions, (B, C + 1, K): Σ_n x_n z_n and, in the last row, Σ_n z_n.

    They add up over any split of the positions into tiles or ranks.
    """
    return torch.cat([problem.x @ z, z.sum(1, keepdim=True)], 1)


def maximization(problem: Problem, sums: Tensor, mu: Tensor) -> Tensor:
    """M-step: the bases (B, C', K) from the :func:`statistics`; ``mu`` are the bases before it."""
    if problem.projection is None:
        return unit_norm(sums[:, :-1], fallback=mu)
    return unit_norm(problem.projection @ sums, fallback=mu)  # Σ y z = W (Σ x z) + b (Σ z)


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
