"""What EM explains, the E-step, the M-step, and the sums between them: the ground that the rest stands on.

Notation of the paper (Li et al., ICCV 2019, arXiv 1907.13426, section 3.2): X is x, μ is mu, Z is z. One stage is

    E:  z  = softmax over the K bases of (scale · yᵀ mu)
    M:  mu = normalise(y z)                                  each basis to unit L2 norm

with y = x, or y = W x + b, which is never formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ema_attention._forms import HALF, has_half_products
from ema_attention._layout import is_channels_last
from ema_attention._torch import (
    at_least_float32,
    may_be_asked,
    may_overwrite,
    multiplies_to_float32,
    without_autocast,
)

Reduce: TypeAlias = Callable[[Tensor], Tensor]
"""Completes the sums over the positions held here with those held elsewhere; the M-step may overwrite its result."""


class Problem(NamedTuple):
    """What the bases are to explain: y at the positions that take part."""

    x: Tensor
    """(B, C, N), 0 where a position does not take part; in the dtype that the products over positions run in."""
    absent: Tensor | None
    """(B, N, 1), True where a position does not take part."""
    projection: Tensor | None
    """[W | b], (C', C + 1), of y = W x + b; float32 or wider."""
    scale: float

    def detach(self) -> Problem:
        """The same with nothing to differentiate."""
        projection = None if self.projection is None else self.projection.detach()
        return Problem(self.x.detach(), self.absent, projection, self.scale)


def prepare(
    x: Tensor, mu: Tensor, scale: float, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Problem, Tensor]:
    """The problem of x (B, C, N) and mask (B, *spatial), and mu, the bases to start from, (1, C', K) or (B, C', K).

    The bases and the projection are float32 or wider. So is x, unless products in its own dtype are faster and as
    good as the plain form's: see :func:`has_half_products`.
    """
    dtype = at_least_float32(x.dtype, mu.dtype)
    absent = None if mask is None else ~mask.flatten(1)[..., None]
    if absent is not None:
        x = x.masked_fill(absent.transpose(1, 2), 0.0)  # NaN · 0 would leak out of a padded position
    if not has_half_products(x, dtype):
        x = x.to(dtype)
    projection = None
    if weight is not None:
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        projection = torch.cat([weight.to(dtype), bias.to(dtype)[:, None]], 1)
    return Problem(x, absent, projection, scale), (mu if mu.dim() == 3 else mu[None]).to(dtype)


class Stage(NamedTuple):
    """What one stage of EM makes."""

    mu: Tensor
    """(B, C', K): the bases after it, unit L2 norm."""
    z: Tensor
    """(B, N, K): the maps, from the bases before it."""
    sums: Tensor
    """The :func:`statistics` (B, C + 1, K) before ``reduce``. Without one, what the M-step has left of
    :func:`sum_over_positions`."""


def run(problem: Problem, mu: Tensor, stages: int, reduce: Reduce | None = None) -> Iterator[Stage]:
    """EM: so many stages on ``problem`` from bases mu (1 or B, C', K)."""
    for _ in range(stages):
        z = expectation(problem, mu)
        sums = sum_over_positions(problem, z) if reduce is None else statistics(problem, z)
        mu = maximization(problem, sums if reduce is None else reduce(sums), mu)
        yield Stage(mu, z, sums)


def expectation(problem: Problem, mu: Tensor) -> Tensor:
    """E-step: the maps z (B, N, K), in x's dtype, for bases mu (1 or B, C', K)."""
    z = logits(problem, mu).softmax(-1).to(problem.x.dtype)  # the softmax is float32 inside, or wider
    return z if problem.absent is None else z.masked_fill(problem.absent, 0.0)


def expectation_backward(z: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the E-step's logits (B, N, K), from its maps and their gradient."""
    z_grad = z * grad  # which is 0 where a position is absent
    return z_grad - z * z_grad.sum(-1, keepdim=True)


def logits(problem: Problem, mu: Tensor) -> Tensor:
    """The products scale · yᵀ mu (B, N, K)."""
    return compare(problem, project(problem, mu))


def project(problem: Problem, mu: Tensor) -> Tensor:
    """The bases that x is compared with, (B, C, K), for bases mu (B, C', K) that y = W x + b is compared with.

    yᵀ mu = xᵀ (Wᵀ mu) + bᵀ mu: where there is a projection, bᵀ mu is one row more, the last.
    """
    bases = mu if problem.scale == 1 else problem.scale * mu
    return bases if problem.projection is None else problem.projection.t() @ bases


def compare(problem: Problem, bases: Tensor) -> Tensor:
    """Computes xᵀ bases (B, N, K) of bases (1 or B, C, K), or [x; 1]ᵀ bases of bases (1 or B, C + 1, K)."""
    channels = problem.x.shape[1]
    plus = bases[:, channels:] if bases.shape[1] > channels else None
    return product(problem.x.transpose(1, 2), bases[:, :channels], plus)


def sum_over_positions(problem: Problem, z: Tensor) -> Tensor:
    """Computes x z (B, C, K), or [x; 1] z (B, C + 1, K) where there is a projection; float32 or wider."""
    if problem.projection is not None:
        return statistics(problem, z)
    return product(problem.x, z).to(at_least_float32(z.dtype))


def statistics(problem: Problem, z: Tensor) -> Tensor:
    """Computes [x; 1] z (B, C + 1, K), float32 or wider: Σ_n x_n z_n and, in the last row, Σ_n z_n.

    It is all that the M-step needs of the positions, and adds up over any split of them into tiles or ranks.
    """
    dtype = at_least_float32(z.dtype)
    return torch.cat([product(problem.x, z).to(dtype), z.sum(1, keepdim=True, dtype=dtype)], 1)


def maximization(problem: Problem, sums: Tensor, mu: Tensor) -> Tensor:
    """M-step: the bases (B, C', K) from the sums over positions, which it may overwrite; ``mu`` are those before."""
    # Σ y z = W (Σ x z) + b (Σ z)
    direction = sums[:, : mu.shape[1]] if problem.projection is None else problem.projection @ sums
    return unit_norm(direction, fallback=mu, may_round=problem.x.dtype in HALF)


def unit_norm(direction: Tensor, fallback: Tensor, may_round: bool) -> Tensor:
    """Each column of ``direction`` (..., C, K) to unit L2 norm; of ``fallback`` where it is zero or not finite.

    ``direction`` is overwritten where nothing is differentiated: a new tensor costs more than what is written to it.
    ``may_round``: it comes from sums in half precision, so a faster norm may differ in the last bits.
    """
    limits = torch.finfo(direction.dtype)
    divide = torch.Tensor.div_ if may_overwrite(direction) else torch.Tensor.div
    if may_round and may_be_asked(direction):
        norm = torch.linalg.vector_norm(direction, dim=-2, keepdim=True)
        if ((norm > limits.tiny**0.25) & (norm < limits.max**0.25)).all():
            return divide(direction, norm)
    # The squares of a norm over- and underflow long before the values do: bring the largest to 1 first.
    peak = largest(direction.detach())
    divisor = peak.clamp(limits.tiny, limits.max)
    is_defined = peak == divisor  # which NaN is not
    direction = divide(direction, divisor)
    if not (may_be_asked(is_defined) and is_defined.all()):
        direction = torch.where(is_defined, direction, fallback)
    return divide(direction, torch.linalg.vector_norm(direction, dim=-2, keepdim=True))


def largest(direction: Tensor) -> Tensor:
    """The largest absolute value (..., 1, K) of each column."""
    if direction.device.type == "cpu":
        return direction.abs().amax(-2, keepdim=True)  # 18 times as fast as the norm there
    norm: Tensor = torch.linalg.vector_norm(direction, math.inf, dim=-2, keepdim=True)
    return norm


def product(a: Tensor, b: Tensor, plus: Tensor | None = None) -> Tensor:
    """The product a b (B, *, *) over channels or positions, plus a row (1 or B, 1, *) if one is given.

    Half precision is accumulated in float32. The result is float32 for float16 and where the device can give it, and
    in the dtype of a elsewhere.
    """
    b = b if b.dtype == a.dtype else b.to(a.dtype)
    b = b.expand(a.shape[0], -1, -1)  # not len(a), which a trace takes for a constant
    if multiplies_to_float32(a, b):
        result: Tensor = torch.bmm(a, b, out_dtype=torch.float32)
        return result if plus is None else result + plus
    if a.dtype == torch.float16:  # whose range a sum over positions leaves
        a, b = a.float(), b.float()
    return torch.bmm(a, b) if plus is None else torch.baddbmm(plus.to(a.dtype), a, b)


def reconstruct(mu: Tensor, z: Tensor, like: Tensor) -> Tensor:
    """The product mu zᵀ (B, C', N) of mu (B, C', K) and z (B, N, K), in z's dtype and the memory layout of ``like``."""
    mu = mu.to(z.dtype)
    with without_autocast(z.device):
        return (z @ mu.transpose(1, 2)).transpose(1, 2) if is_channels_last(like) else mu @ z.transpose(1, 2)
