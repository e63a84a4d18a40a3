"""The residual half of the unit, relu(x + norm(conv2(relu(mu zᵀ)))), in each of its forms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ema_attention._blocks import by_blocks, position_blocks
from ema_attention._forms import folds_norm, recomputes_activation
from ema_attention._layout import is_channels_last
from ema_attention._steps import reconstruct
from ema_attention._torch import insert_row_dimension, is_plain, mend_gradient_of_one_sample


def residual(x: Tensor, mu: Tensor, z: Tensor, conv2: nn.Sequential, final_relu: bool) -> Tensor:
    """Computes x + conv2(relu(mu zᵀ)), then ReLU, of x (B, C, N), bases mu (B, C', K) and maps z (B, N, K)."""
    if folds_norm(conv2, x, mu, z):
        return inference_tail(x, mu.to(x.dtype), z.to(x.dtype), *_folded(conv2), final_relu)
    image = insert_row_dimension(x)
    if recomputes_activation(conv2, x):
        conv: Any = conv2[0]
        norm = conv2[1]
        y: Tensor = norm(insert_row_dimension(reconstruct_conv(mu, z, conv.weight.flatten(1), like=x)))
        if is_plain(norm, nn.BatchNorm2d):
            y += image  # in place: nobody, its backward included, looks at its output
        else:
            y = y + image
    else:
        y = image + conv2(insert_row_dimension(F.relu(reconstruct(mu, z, like=x))))
    y = (y.relu_() if final_relu else y).squeeze(2)
    mend_gradient_of_one_sample(y)
    return y


def _folded(conv2: nn.Sequential) -> tuple[Tensor, Tensor]:
    """Weight (C, C') and shift (C, 1) of conv2 with its norm folded into the convolution."""
    norm: Any = conv2[1]
    gain = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = (norm.bias - norm.running_mean * gain)[:, None]
    weight: Any = conv2[0].weight
    return gain[:, None] * weight.flatten(1), shift


def inference_tail(x: Tensor, mu: Tensor, z: Tensor, weight: Tensor, shift: Tensor, final_relu: bool) -> Tensor:
    """Computes x + weight · relu(mu zᵀ) + shift (B, C, N), then ReLU. Nothing N×C is written but the result."""

    def block(x: Tensor, z: Tensor) -> Tensor:
        result = _conv(weight, reconstruct(mu, z.mT, like=x).relu_())
        result += x
        result += shift
        return result.relu_() if final_relu else result

    return by_blocks(block, x, z.mT, result=lambda: _empty_like(x, weight))


def reconstruct_conv(mu: Tensor, z: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """The product weight · relu(mu zᵀ), laid out as ``like`` (B, C, N), of mu (B, C', K), z (B, N, K), weight (C, C').

    The (B, C', N) activation between them is not kept for backward, but computed again there.
    """
    y: Tensor = _ReconstructConv.apply(mu.to(like.dtype), z.to(like.dtype), weight, like.detach())
    return y


class _ReconstructConv(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(mu: Tensor, z: Tensor, weight: Tensor, like: Tensor) -> Tensor:
        def block(like: Tensor, z: Tensor) -> Tensor:
            return _conv(weight, reconstruct(mu, z.mT, like).relu_())

        return by_blocks(block, like, z.mT, result=lambda: _empty_like(like, weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        mu, z, weight, _ = inputs
        ctx.save_for_backward(mu, z, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mu, z, weight = ctx.saved_tensors
        grad_weight, grad_mu, grad_z = torch.zeros_like(weight), torch.zeros_like(mu), []
        for grad_block, z_block in position_blocks(grad, z.mT):
            rectified = reconstruct(mu, z_block.mT, like=grad_block).relu()
            if ctx.needs_input_grad[2]:
                grad_weight = grad_weight + (grad_block @ rectified.mT).sum(0)
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
                grad_rectified = _conv(weight.mT, grad_block) * rectified.sign()
                grad_mu = grad_mu + grad_rectified @ z_block.mT
                grad_z.append(grad_rectified.mT @ mu)
        return grad_mu, torch.cat(grad_z, 1) if grad_z else None, grad_weight, None


def _empty_like(x: Tensor, weight: Tensor) -> Tensor:
    """Memory for ``_conv(weight, …)`` laid out as x (B, C, N); of ``weight``, for vmap to see what it maps over."""
    return weight.new_empty(x.mT.shape).mT if is_channels_last(x) else weight.new_empty(x.shape)


def _conv(weight: Tensor, x: Tensor) -> Tensor:
    """The product weight (C, C') · x (B, C', N), in the memory layout of x."""
    if is_channels_last(x):
        return (x.mT @ weight.mT).mT
    return torch.bmm(weight.expand(len(x), -1, -1), x)
