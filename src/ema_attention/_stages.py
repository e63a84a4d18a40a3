"""All stages of EM with one product for the gradient of x.

Autograd would write an N×C gradient of x for each of the 2T products with x, and add them up; here one product writes
their sum. What is computed, and what the derivative of each step is, stands in ``_steps``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ema_attention._blocks import by_blocks
from ema_attention._layout import is_channels_last
from ema_attention._steps import (
    Problem,
    compare,
    expectation_backward,
    maximization,
    project,
    reconstruct,
    run,
    sum_over_positions,
)
from ema_attention._torch import pull_back, without_autocast


def run_with_one_product(problem: Problem, mu: Tensor, stages: int) -> tuple[Tensor, Tensor]:
    """The bases (B, C', K) and maps (B, N, K) of the last stage of ``_steps.run``."""
    x, absent, projection, scale = problem
    *_, mu, z, _ = _Stages.apply(x, mu.expand(len(x), -1, -1), projection, absent, scale, stages)
    return mu, z if absent is None else z.masked_fill(absent, 0.0)  # a gradient there may be infinite


class _Stages(torch.autograd.Function):
    """EM whose backward keeps x, the bases and the maps, and gathers the gradient of x in one product.

    The bases, maps and sums of every stage are outputs, not hidden state: so backward is an ordinary
    differentiable function of saved inputs and outputs, and second derivatives come out right.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, mu: Tensor, projection: Tensor | None, absent: Tensor | None, scale: float, stages: int
    ) -> tuple[Tensor, ...]:
        problem = Problem(x, absent, projection, scale)
        # a copy of the sums is what the M-step may overwrite
        return tuple(tensor for stage in run(problem, mu, stages, reduce=torch.clone) for tensor in stage)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, mu, projection, _, ctx.scale, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mu, projection, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, mu, projection, *history = ctx.saved_tensors
        with without_autocast(x.device):
            return _backward(ctx, Problem(x, None, projection, ctx.scale), mu, history, grads)


def _backward(
    ctx: Any, problem: Problem, mu: Tensor, history: list[Tensor], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    x, _, projection, scale = problem
    if x.dtype == torch.float16:  # in which gradients of sums over many positions underflow
        problem = problem._replace(x=x.float())
    normalise = partial(maximization, problem._replace(projection=None))
    grad_mu = torch.zeros_like(mu)
    of_x: list[tuple[Tensor, Tensor]] = []  # the gradient of x is the sum of their products, left · rightᵀ
    of_projection: list[tuple[Tensor, Tensor]] = []  # and so is the projection's
    for t in reversed(range(0, len(history), 3)):
        _, z, sums = history[t : t + 3]
        before = history[t - 3] if t else mu
        # M-step: mu = normalise(direction, before), direction = projection · sums, sums = [x; 1] z
        direction = sums[:, : mu.shape[1]] if projection is None else projection @ sums
        grad_direction, grad_before = pull_back(normalise, (direction, before), _add(grad_mu, grads[t]))
        grad_sums = F.pad(grad_direction, (0, 0, 0, 1)) if projection is None else projection.mT @ grad_direction
        grad_sums = _add(grad_sums, grads[t + 2])
        grad_z = compare(problem, grad_sums).to(mu.dtype)
        of_x.append((grad_sums[:, : x.shape[1]], z))
        # E-step: z = softmax(logits), logits = [x; 1]ᵀ bases, bases = scale · projectionᵀ before
        grad_logits = expectation_backward(z, _add(grad_z, grads[t + 1]))
        grad_bases = sum_over_positions(problem, grad_logits)
        grad_mu = scale * (grad_bases if projection is None else projection @ grad_bases) + grad_before
        of_x.append((project(problem, before)[:, : x.shape[1]], grad_logits))
        of_projection += [(grad_direction, sums), (scale * before, grad_bases)]
    grad_x = grad_projection = None
    if ctx.needs_input_grad[0]:
        grad_x = _product(*_concatenated(of_x), like=problem.x).to(x.dtype)
    if ctx.needs_input_grad[2]:
        left, right = _concatenated(of_projection)
        grad_projection = (left @ right.mT).sum(0)
    return grad_x, grad_mu, grad_projection, None, None, None


def _concatenated(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One left and one right factor (B, *, M) whose product left · rightᵀ is the sum of the pairs' products."""
    left, right = zip(*pairs, strict=True)
    return torch.cat(left, -1), torch.cat(right, -1)


def _product(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """Computes left · rightᵀ (B, C, N) of left (B, C, M) and right (B, N, M), laid out as ``like``.

    In blocks because a GEMM is slow, by a third, to write rows of an odd length such as 65².
    """
    if is_channels_last(like) or torch.is_grad_enabled():  # where a gradient is wanted of this gradient
        return reconstruct(left, right, like)
    return by_blocks(left.matmul, right.mT, result=lambda: left.new_empty(like.shape))


def _add(a: Tensor, b: Tensor | None) -> Tensor:
    return a if b is None else a + b
