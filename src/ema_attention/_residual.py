"""The residual half of the unit, relu(x + norm(conv2(relu(mu zᵀ)))), in each of its forms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ema_attention._blocks import by_blocks
from ema_attention._convolution import convolve, convolve_backward
from ema_attention._forms import adds_in_place, residual_form, sees_single_positions
from ema_attention._layout import Layout, is_channels_last
from ema_attention._steps import reconstruct
from ema_attention._torch import (
    at_least_float32,
    autocast_dtype,
    mend_batch_stride,
    mend_gradient_of_one_sample,
    without_autocast,
)


def residual(x: Tensor, mu: Tensor, z: Tensor, conv2: nn.Sequential, final_relu: bool, layout: Layout) -> Tensor:
    """Computes x + conv2(relu(mu zᵀ)), then ReLU, in the layout that x (B, C, N) came from.

    Of bases mu (B, C', K) and maps z (B, N, K).
    """
    z = z.to(autocast_dtype(x))
    mu = mu.to(z.dtype)
    form = residual_form(conv2, x, mu, z)
    if form == "folded":
        with without_autocast(x.device):
            return layout.restore(inference_tail(x, mu, z, *fold_norm(conv2), final_relu))
    as_image = layout.row if sees_single_positions(conv2) else layout.image
    if form == "called":
        y = conv2(as_image(reconstruct(mu, z, like=x).relu_()))
    else:
        weight: Any = conv2[0].weight
        weight = weight.flatten(1).to(z.dtype)
        if form == "recomputed":
            y = reconstruct_conv(mu, z, weight, like=x)
        else:
            y = convolve(weight, reconstruct(mu, z, like=x).relu_())
        y = conv2[1](mend_batch_stride(as_image(y)))
    image = as_image(x)
    # in place where nobody, its backward included, looks at the norm's output
    y = y.add_(image) if adds_in_place(conv2) and y.dtype == x.dtype else y + image
    y = y.relu_() if final_relu else y
    mend_gradient_of_one_sample(y)
    return layout.restore(y.flatten(2))


def fold_norm(conv2: nn.Sequential) -> tuple[Tensor, Tensor]:
    """Weight (C, C') and shift (C, 1) of conv2 with its norm folded into the convolution, float32 or wider."""
    conv: Any
    norm: Any
    conv, norm = conv2
    dtype = at_least_float32(conv.weight.dtype)
    norm_weight, bias, mean, variance = (
        parameter.to(dtype) for parameter in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    gain = norm_weight * (variance + norm.eps).rsqrt()
    shift = torch.addcmul(bias, mean, gain, value=-1)
    return gain[:, None] * conv.weight.flatten(1), shift[:, None]


def inference_tail(x: Tensor, mu: Tensor, z: Tensor, weight: Tensor, shift: Tensor, final_relu: bool) -> Tensor:
    """Computes x + weight · relu(mu zᵀ) + shift (B, C, N), then ReLU. Nothing N×C is written but the result.

    The products are in the dtype of mu and z, the sum in what x and they are promoted to.
    """
    weight = weight.to(z.dtype)
    shift = shift.to(torch.promote_types(x.dtype, z.dtype))

    def block(x: Tensor, z: Tensor) -> Tensor:
        result = convolve(weight, reconstruct(mu, z.mT, like=x).relu_())
        result = result.add_(x) if result.dtype == shift.dtype else result + x
        result += shift
        return result.relu_() if final_relu else result

    return by_blocks(block, x, z.mT, result=lambda: _empty_like(x, shift.dtype))


def reconstruct_conv(mu: Tensor, z: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """The product weight · relu(mu zᵀ), laid out as ``like`` (B, C, N), of mu (B, C', K), z (B, N, K), weight (C, C').

    The (B, C', N) activation between them is not kept for backward, but computed again there.
    """
    y: Tensor = _ReconstructConv.apply(mu, z, weight, like.detach())
    return y


class _ReconstructConv(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(mu: Tensor, z: Tensor, weight: Tensor, like: Tensor) -> Tensor:
        def block(like: Tensor, z: Tensor) -> Tensor:
            return convolve(weight, reconstruct(mu, z.mT, like).relu_())

        with without_autocast(z.device):
            return by_blocks(block, like, z.mT, result=lambda: _empty_like(like, weight.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        mu, z, weight, _ = inputs
        ctx.save_for_backward(mu, z, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mu, z, weight = ctx.saved_tensors
        with without_autocast(z.device):
            rectified = reconstruct(mu, z, like=grad).relu_()
            grad_weight = convolve_backward(weight, rectified, grad) if ctx.needs_input_grad[2] else None
            if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
                return None, None, grad_weight, None
            grad = convolve(weight.mT, grad) * rectified.sign()
            return grad @ z, grad.mT @ mu, grad_weight, None


def _empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """New memory laid out as x (B, C, N)."""
    return x.new_empty(x.mT.shape, dtype=dtype).mT if is_channels_last(x) else x.new_empty(x.shape, dtype=dtype)
