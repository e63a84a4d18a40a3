"""The 1×1 convolution, by PyTorch's or as a matrix product, whichever is faster; see ``_forms.multiplies_faster``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from ema_attention._forms import HALF, multiplies_faster
from ema_attention._layout import is_channels_last
from ema_attention._torch import differentiates


def convolve(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The 1×1 convolution of x (B, C, N) with weight (C', C) and bias (C',), in the memory layout of x."""
    if not multiplies_faster(x):
        return F.conv2d(x[:, :, None], weight[..., None, None], bias).squeeze(2)
    if is_channels_last(x):
        rows: Tensor = F.linear(x.mT, weight, bias)
        return rows.mT
    shift = None if bias is None else bias[:, None]
    batch, _, positions = x.shape
    if _copies_faster(weight, x):
        row = x.transpose(0, 1).flatten(1)  # which backward holds
        y = weight @ row if shift is None else torch.addmm(shift, weight, row)
        return y.view(len(weight), batch, positions).transpose(0, 1).contiguous()
    weight = weight.expand(batch, -1, -1)
    return torch.bmm(weight, x) if shift is None else torch.baddbmm(shift, weight, x)


def _copies_faster(weight: Tensor, x: Tensor) -> bool:
    """Whether one product of a copy of few positions takes less time than a product for each sample of x (B, C, N).

    The latter reads the weight (C', C) each time. It also copies it in half precision, and makes a gradient of it.
    """
    copied = x.shape[2] * sum(weight.shape)
    return (copied if x.dtype in HALF or differentiates(weight) else 4 * copied) < weight.numel()


def convolve_backward(weight: Tensor, x: Tensor, grad: Tensor) -> Tensor:
    """The gradient (C', C) of the weight of :func:`convolve`, from that of its output."""
    if not multiplies_faster(x):
        grad_weight: Tensor = conv2d_weight(x[:, :, None], [*weight.shape, 1, 1], grad[:, :, None])
        return grad_weight[:, :, 0, 0]
    if is_channels_last(x):
        return grad.mT.flatten(0, 1).t() @ x.mT.flatten(0, 1)
    return torch.bmm(grad, x.mT).sum(0)
