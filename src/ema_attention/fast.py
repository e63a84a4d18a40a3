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

from collections.abc import Callable, Iterator
from typing import Any, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vjp as _vjp

from ema_attention.functional import (
    autocasts,
    expectation,
    is_channels_last,
    maximization,
    reconstruct,
    statistics,
    unit_norm,
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
    x: Tensor, mu: Tensor, stages: int, scale: float, mask: Tensor | None, projection: Tensor | None
) -> tuple[Tensor, Tensor]:
    """EM's ``stages`` from bases mu (B, C', K) on x (B, C, N), with one product for the gradient of x."""
    *_, mu, z, _ = _Stages.apply(x, mu, stages, scale, mask, projection)
    return mu, z


class _Stages(torch.autograd.Function):
    """EM whose backward keeps x, the bases and the maps, and gathers each gradient in one product.

    The bases, maps and sums of every stage are outputs, not hidden state: so backward is an ordinary
    differentiable function of saved inputs and outputs, and second derivatives come out right.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, mu: Tensor, stages: int, scale: float, mask: Tensor | None, projection: Tensor | None
    ) -> tuple[Tensor, ...]:
        x = x.to(mu.dtype)
        history: list[Tensor] = []
        for _ in range(stages):
            z = expectation(x, mu, scale, mask, projection)
            sums = statistics(x, z)
            mu = maximization(sums, mu, projection)
            history += [mu, z, sums]
        return tuple(history)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, mu, _, ctx.scale, _, projection = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mu, projection, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x_given, mu_given, projection, *history = ctx.saved_tensors
        x = x_given.to(mu_given.dtype)
        grad_mu = torch.zeros_like(mu_given)
        of_x: list[tuple[Tensor, Tensor]] = []  # the gradient of x is the sum of left · rightᵀ
        of_projection: list[tuple[Tensor, Tensor]] = []  # and so is the projection's
        for t in reversed(range(0, len(history), 3)):
            _, z, sums = history[t : t + 3]
            previous = history[t - 3] if t else mu_given
            grad_mu = _add(grad_mu, grads[t])
            # M-step: mu = normalise(direction), direction = projection · sums
            direction = sums[:, :-1] if projection is None else projection @ sums
            _, pull = vjp(unit_norm, direction, previous)
            grad_direction, grad_previous = pull(grad_mu)
            if projection is None:
                grad_sums = F.pad(grad_direction, (0, 0, 0, 1))
            else:
                grad_sums = projection.mT @ grad_direction
                of_projection.append((grad_direction, sums))
            grad_sums = _add(grad_sums, grads[t + 2])
            grad_z = _add(torch.baddbmm(grad_sums[:, -1:], x.mT, grad_sums[:, :-1]), grads[t + 1])
            of_x.append((grad_sums[:, :-1], z))
            # E-step: z = softmax(logits), logits = xᵀ bases, bases = scale · projectionᵀ mu
            z_grad_z = z * grad_z
            grad_logits = z_grad_z - z * z_grad_z.sum(-1, keepdim=True)
            bases, grad_bases = ctx.scale * previous, statistics(x, grad_logits)
            if projection is None:
                grad_mu = ctx.scale * grad_bases[:, :-1] + grad_previous
            else:
                grad_mu = ctx.scale * (projection @ grad_bases) + grad_previous
                of_projection.append((bases, grad_bases))
                bases = (projection.mT @ bases)[:, :-1]
            of_x.append((bases, grad_logits))
        grad_x = grad_projection = None
        if ctx.needs_input_grad[0]:
            grad_x = _blockwise_product(*_concatenated(of_x), like=x).to(x_given.dtype)
        if ctx.needs_input_grad[5]:
            grad_projection = torch.einsum("bik,bjk->ij", *_concatenated(of_projection))
        return grad_x, grad_mu, None, None, None, grad_projection


def _concatenated(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One left and one right factor (B, *, M) whose product left · rightᵀ is the sum of the pairs' products."""
    left, right = zip(*pairs, strict=True)
    return torch.cat(left, -1), torch.cat(right, -1)


def _blockwise_product(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """Computes left · rightᵀ (B, C, N) of left (B, C, M) and right (B, N, M), laid out as ``like``.

    In blocks because a GEMM is slow, by a third, to write rows of an odd length such as 65².
    """
    if is_channels_last(like) or torch.is_grad_enabled():  # where a gradient is wanted of this gradient
        return reconstruct(left, right, like)
    return _by_blocks(left.matmul, right.mT, room=lambda: left.new_empty(like.shape))


def _add(a: Tensor, b: Tensor | None) -> Tensor:
    return a if b is None else a + b


def stands_in_for(conv2: nn.Module, x: Tensor) -> bool:
    """Whether calling ``EMAUnit``'s conv2 on what is like x would run the 1×1 convolution and norm it was made of."""
    if is_tracing() or autocasts(x.device) or not (is_plain(conv2, nn.Sequential) and len(conv2) == 2):
        return False
    conv = conv2[0]
    return (
        is_plain(conv, nn.Conv2d)
        and conv.bias is None
        and conv.kernel_size == (1, 1)
        and conv.groups == 1
        and all(t.dtype == x.dtype for t in (*conv2.parameters(), *conv2.buffers()) if t.is_floating_point())
    )


def is_foldable(norm: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether ``norm`` is an affine map of each channel that is known beforehand."""
    kind = nn.SyncBatchNorm if type(norm) is nn.SyncBatchNorm else nn.BatchNorm2d
    if not is_plain(norm, kind) or norm.training:
        return False
    return all(t is not None for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var))


_Module = TypeVar("_Module", bound=nn.Module)


def is_plain(module: nn.Module, kind: type[_Module]) -> TypeGuard[_Module]:
    """Whether ``module`` is of just this class: no subclass, no hook, no forward of its own."""
    return type(module) is kind and not is_patched(module)


def is_patched(module: nn.Module) -> bool:
    """Whether ``module`` has hooks or a forward of its own. (Hooks on all modules, as counters set, are let be.)"""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or (not is_tracing() and "forward" in vars(module))  # which PyTorch 2.6 cannot trace


def reconstruct_conv(mu: Tensor, z: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """The product weight · relu(mu zᵀ), a 1×1 convolution of the reconstruction, laid out as ``like`` (B, C, N).

    mu is (B, C', K), z (B, N, K) and weight (C, C'). Only these are kept for backward; the (B, C', N)
    activation between them is computed again there.
    """
    y: Tensor = _ReconstructConv.apply(mu.to(like.dtype), z.to(like.dtype), weight, like.detach())
    return y


def inference_tail(x: Tensor, mu: Tensor, z: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, final_relu: bool) -> Tensor:
    """Computes x + norm(conv(relu(mu zᵀ))) (B, C, N), then ReLU, with the norm folded into the convolution.

    mu is (B, C', K), z (B, N, K), both in x's dtype. Nothing N×C is written but the result.
    """
    assert norm.running_mean is not None  # for the type checker: is_foldable has looked
    assert norm.running_var is not None
    gain = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = (norm.bias - norm.running_mean * gain)[:, None]
    weight = gain[:, None] * conv.weight.flatten(1)

    def block(x: Tensor, z: Tensor) -> Tensor:
        result = _conv(weight, reconstruct(mu, z.mT, like=x).relu_())
        result += x
        result += shift
        return result.relu_() if final_relu else result

    return _by_blocks(block, x, z.mT, room=lambda: _empty_like(x, weight))


class _ReconstructConv(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(mu: Tensor, z: Tensor, weight: Tensor, like: Tensor) -> Tensor:
        def block(like: Tensor, z: Tensor) -> Tensor:
            return _conv(weight, reconstruct(mu, z.mT, like).relu_())

        return _by_blocks(block, like, z.mT, room=lambda: _empty_like(like, weight))

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
                grad_rectified = _conv(weight.mT, grad_block) * rectified.sign()
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


def _by_blocks(function: Callable[..., Tensor], *tensors: Tensor, room: Callable[[], Tensor]) -> Tensor:
    """The results of ``function`` on the blocks of tensors (B, *, N), one behind the other in what ``room`` makes."""
    blocks = list(_position_blocks(*tensors))
    if len(blocks) == 1:
        return function(*tensors)
    result = room()
    for (result_block,), block in zip(_position_blocks(result), blocks, strict=True):
        result_block.copy_(function(*block))
    return result


def _empty_like(x: Tensor, weight: Tensor) -> Tensor:
    """Room for ``_conv(weight, …)`` laid out as x (B, C, N); of ``weight``, for vmap to see what it maps over."""
    return weight.new_empty(x.mT.shape).mT if is_channels_last(x) else weight.new_empty(x.shape)


def _conv(weight: Tensor, x: Tensor) -> Tensor:
    """The product weight (C, C') · x (B, C', N), in the memory layout of x."""
    if is_channels_last(x):
        return (x.mT @ weight.mT).mT
    return torch.bmm(weight.expand(len(x), -1, -1), x)
