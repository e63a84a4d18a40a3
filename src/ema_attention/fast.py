"""What is here only for speed and memory. Every function equals a plain form elsewhere, and is tested to.

===================== ============================== =============================================
here                  plain form                     what it saves
===================== ============================== =============================================
``run_stages``        the loop in ``functional``     autograd writes one N×C gradient of x for each of
                                                     the 2T products with x; here one GEMM writes their sum
``reconstruct_conv``  ``conv(relu(reconstruct()))``  an N×C activation held from forward to backward
``inference_tail``    ``EMAUnit``'s conv2 and ReLUs  every N×C tensor but the output
===================== ============================== =============================================

None of it is used while a graph is traced (torch.compile, export): compilers fuse the plain form.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.func import vjp as _vjp

from ema_attention.functional import (
    autocasts,
    bases_of_x,
    expectation,
    is_channels_last,
    maximization,
    reconstruct,
    statistics,
)

vjp: Any = _vjp  # its annotation has room for an auxiliary output that is not asked for here


def differentiates(*tensors: Tensor | None) -> bool:
    """Whether autograd, running eagerly, will want a gradient of one of these."""
    if is_tracing() or not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_tracing() -> bool:
    """Whether the code that runs is being recorded, so that data-sized loops and custom gradients have no place."""
    return torch.compiler.is_compiling() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def run_stages(
    x: Tensor, mu: Tensor, stages: int, scale: float, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """EM's ``stages`` from bases mu (B, C', K) on x (B, C, N), with one product for the gradient of x."""
    *_, mu, z, _ = _Stages.apply(x, mu, stages, scale, mask, weight, bias)
    return mu, z


class _Stages(torch.autograd.Function):
    """EM whose backward keeps x, the bases and the maps, and gathers the gradient of x in one product.

    The bases, maps and sums of every stage are outputs, not hidden state: so backward is an ordinary
    differentiable function of saved inputs and outputs, and second derivatives come out right.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        mu: Tensor,
        stages: int,
        scale: float,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, ...]:
        x = x.to(mu.dtype)
        history: list[Tensor] = []
        for _ in range(stages):
            z = expectation(x, mu, scale, mask, weight, bias)
            sums = statistics(x, z)
            mu = maximization(sums, mu, weight, bias)
            history += [mu, z, sums]
        return tuple(history)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, mu, _, ctx.scale, _, weight, bias = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mu, weight, bias, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x_given, mu_given, weight, bias, *history = ctx.saved_tensors
        x = x_given.to(mu_given.dtype)
        projection = tuple(p for p in (weight, bias) if p is not None)
        grad_projection = [torch.zeros_like(p) for p in projection]
        grad_mu: Tensor | None = None
        left, right = [], []  # the gradient of x is the sum of left · rightᵀ
        for t in reversed(range(0, len(history), 3)):
            mu, z, sums = history[t : t + 3]
            previous = history[t - 3] if t else mu_given
            grad_mu, grad_z = _add(grad_mu, grads[t]), grads[t + 1]
            # M-step: mu = normalise(W Σ x z + b Σ z)
            _, pull = vjp(maximization, sums, previous, *projection)
            grad_sums, grad_previous, *grad_p = pull(torch.zeros_like(mu) if grad_mu is None else grad_mu)
            grad_projection = [a + b for a, b in zip(grad_projection, grad_p, strict=True)]
            grad_sums = grad_sums if grads[t + 2] is None else grad_sums + grads[t + 2]
            grad_total, grad_mass = grad_sums[:, :-1], grad_sums[:, -1:]
            grad_z = _add(x.mT @ grad_total + grad_mass, grad_z)
            # E-step: z = softmax(scale · (xᵀ bases + offset))
            z_grad_z = z * grad_z
            grad_logits = ctx.scale * (z_grad_z - z * z_grad_z.sum(-1, keepdim=True))
            (bases, _), pull = vjp(bases_of_x, previous, *projection)
            grad_offset = grad_logits.sum(1, keepdim=True) if bias is not None else grad_logits.new_zeros(1, 1, 1)
            grad_mu, *grad_p = pull((x @ grad_logits, grad_offset))
            grad_projection = [a + b for a, b in zip(grad_projection, grad_p, strict=True)]
            grad_mu = grad_mu + grad_previous
            left += [grad_total, bases]
            right += [z, grad_logits]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = reconstruct(torch.cat(left, -1), torch.cat(right, -1), like=x).to(x_given.dtype)
        grad_weight, grad_bias, *_ = *grad_projection, None, None
        return grad_x, grad_mu, None, None, None, grad_weight, grad_bias


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def stands_in_for(conv2: nn.Module, x: Tensor) -> bool:
    """Whether calling ``EMAUnit``'s conv2 on what is like x would do what is done here, and nothing else."""
    if is_tracing() or autocasts(x.device) or not (_is_plain(conv2, nn.Sequential) and len(conv2) == 2):
        return False
    conv, norm = conv2
    return (
        _is_plain(conv, nn.Conv2d)
        and _is_plain(norm, nn.BatchNorm2d)
        and conv.bias is None
        and conv.kernel_size == (1, 1)
        and conv.groups == 1
        and all(p.dtype == x.dtype for p in conv2.parameters())
    )


_Module = TypeVar("_Module", bound=nn.Module)


def _is_plain(module: nn.Module, kind: type[_Module]) -> TypeGuard[_Module]:
    """Whether ``module`` is of just this class, not a subclass or parametrized, and without hooks."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and not any(hooks)


def reconstruct_conv(mu: Tensor, z: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """The product weight · relu(mu zᵀ), a 1×1 convolution of the reconstruction, laid out as ``like`` (B, C, N).

    mu is (B, C', K), z (B, N, K) and weight (C, C'). Only these are kept for backward; the (B, C', N)
    activation between them is computed again there.
    """
    y: Tensor = _ReconstructConv.apply(mu.to(like.dtype), z.to(like.dtype), weight, like.detach())
    return y


def inference_tail(x: Tensor, mu: Tensor, z: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, final_relu: bool) -> Tensor:
    """Computes x + norm(conv(relu(mu zᵀ))) (B, C, N), then ReLU, with the norm folded into the convolution.

    mu is (B, C', K), z (B, N, K). Nothing N×C is written but the result.
    """
    assert norm.running_mean is not None  # for the type checker: the caller has looked
    assert norm.running_var is not None
    gain = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = (norm.bias - norm.running_mean * gain)[:, None]
    weight = gain[:, None] * conv.weight.flatten(1)
    y = torch.empty_like(x)
    for x_block, y_block, z_block in _position_blocks(x, y, z.mT):
        result = _conv(weight, reconstruct(mu, z_block.mT, like=x_block).relu_())
        result += x_block
        result += shift
        y_block.copy_(result.relu_() if final_relu else result)
    return y


class _ReconstructConv(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(mu: Tensor, z: Tensor, weight: Tensor, like: Tensor) -> Tensor:
        y = torch.empty_like(like)
        for y_block, z_block in _position_blocks(y, z.mT):
            y_block.copy_(_conv(weight, reconstruct(mu, z_block.mT, like=y_block).relu_()))
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        mu, z, weight, _ = inputs
        ctx.save_for_backward(mu, z, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mu, z, weight = ctx.saved_tensors
        grad_weight, grad_mu, grad_z = torch.zeros_like(weight), torch.zeros_like(mu), []
        for grad_block, z_block in _position_blocks(grad, z.mT):
            rectified = reconstruct(mu, z_block.mT, like=grad_block).relu()
            if ctx.needs_input_grad[2]:
                grad_weight = grad_weight + (grad_block @ rectified.mT).sum(0)
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
                grad_rectified = _conv(weight.mT, grad_block).where(rectified > 0, 0.0)
                grad_mu = grad_mu + grad_rectified @ z_block.mT
                grad_z.append(grad_rectified.mT @ mu)
        return grad_mu, torch.cat(grad_z, 1) if grad_z else None, grad_weight, None


def _position_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of tensors (B, *, N) over the same positions: blocks that stay in cache on a CPU, all of them elsewhere.

    512 float32 positions of 512 channels fill an L2 cache of 1 MB. Measured there: 0.8 of the time of
    all positions at once for (1, 512, 65, 65), and no N×C temporary.
    """
    positions = max(1, tensors[0].shape[2])
    size = 512 if tensors[0].device.type == "cpu" else positions
    return zip(*(tensor.split(size, 2) for tensor in tensors), strict=True)


def _conv(weight: Tensor, x: Tensor) -> Tensor:
    """The product weight (C, C') · x (B, C', N), in the memory layout of x."""
    if is_channels_last(x):
        return (x.mT @ weight.mT).mT
    return torch.bmm(weight.expand(len(x), -1, -1), x)
