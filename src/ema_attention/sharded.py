"""EM attention of samples whose positions are spread over the ranks of a process group.

The sums of the M-step add up over positions, so K·(C + 1) numbers a sample and stage are all that the
ranks exchange, however many positions there are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ema_attention._checks import GradientMode, check_arguments, check_group
from ema_attention._layout import flatten
from ema_attention._steps import prepare
from ema_attention.functional import EMAttention, expectation_maximization, reconstruction

__all__ = ["sharded_em_attention"]


def sharded_em_attention(
    x: Tensor,
    mu: Tensor,
    stages: int,
    *,
    group: dist.ProcessGroup | None = None,
    scale: float = 1.0,
    gradient: GradientMode = "all",
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> EMAttention:
    r""":func:`em_attention` of samples whose positions are split over ranks: each rank gives and gets its own.

    Equal to ``em_attention`` of the slices put together, in whatever dimension they were cut and
    however unequal they are (a slice may be empty). Each stage sums K·(C + 1) numbers a sample over the
    ranks: one all-reduce, and one more in its backward.

    Every rank of ``group`` has to call it, with the same B, ``mu``, ``weight``, ``bias`` and settings, and
    every rank has to run backward if one does. The gradient of x is then the rank's slice of the unsharded
    gradient of the losses' sum over the ranks; those of ``mu``, ``weight`` and ``bias`` are the rank's share,
    and their sum over the ranks is the unsharded gradient. (DistributedDataParallel takes the mean instead:
    multiply the loss by the number of ranks.)

    Args:
        x: the rank's slice of the features, (B, C, \*spatial).
        mu: the bases to start from. All arguments but ``group`` are those of :func:`em_attention`.
        stages: T.
        group: the process group that shares the samples; ``None`` for all ranks.
        scale: λ.
        gradient: ``"all"``, ``"last"`` or ``"none"``.
        mask: (B, \*spatial), the rank's slice.
        weight: (C', C).
        bias: (C',).

    Returns:
        ``(out, mu, z)``: out (B, C', \*spatial) and z (B, K, \*spatial) for the rank's slice; mu (B, C', K), the
        same on every rank.

    Raises:
        TypeError, ValueError: as :func:`em_attention`; ValueError where torch.distributed is not initialised, or
            the rank is not in ``group``.
    """
    check_arguments(x, mu, stages, scale, gradient, mask, weight, bias)
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("sharded_em_attention needs torch.distributed; got no initialised process group")
    check_group("group", group)

    def reduce(sums: Tensor) -> Tensor:
        total: Tensor = _AllReduce.apply(sums, group)
        return total

    features, layout = flatten(x)
    problem, start = prepare(features, mu, scale, mask, weight, bias)
    bases, z = expectation_maximization(problem, start, stages, gradient, reduce)
    return reconstruction(features, layout, bases.to(mu.dtype), z)


class _AllReduce(torch.autograd.Function):
    """Differentiable, as torch.distributed.nn.functional.all_reduce was before it was deprecated."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _AllReduce.apply(grads[0], ctx.group), None
