"""Any layout to (B, C, N) and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Layout(NamedTuple):
    """How a tensor was laid out before :func:`flatten`; it undoes that."""

    channel_dim: int
    spatial: torch.Size
    is_channels_last: bool
    """Whether the channels lay next to each other in memory."""

    def restore(self, y: Tensor) -> Tensor:
        """A tensor (B, C, N) in the layout; C need not be what it was."""
        if is_channels_last(y) != self.is_channels_last:
            y = y.mT.contiguous().mT if self.is_channels_last else y.contiguous()
        return self.restore_maps(y).movedim(1, self.channel_dim)

    def restore_maps(self, z: Tensor) -> Tensor:
        """Maps (B, K, N) as (B, K, *spatial), wherever the channels are."""
        unflattened: Tensor = z.unflatten(2, self.spatial)
        return unflattened


def flatten(x: Tensor, channel_dim: int = 1) -> tuple[Tensor, Layout]:
    """View (or copy) of x as (B, C, N), and the layout that undoes it."""
    x = x.movedim(channel_dim, 1)
    flat = x.flatten(2)
    return flat, Layout(channel_dim, x.shape[2:], is_channels_last(flat))


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of x (B, C, N) lie next to each other in memory."""
    return x.stride(1) < x.stride(2)


def convolve(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The 1×1 convolution of x (B, C, N) with weight (C', C) as matrix products, in the memory layout of x."""
    if is_channels_last(x):
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x.mT, weight.to(x.dtype), bias).mT  # one product for the whole batch
    weight = weight.to(x.dtype).expand(x.shape[0], -1, -1)
    return torch.bmm(weight, x) if bias is None else torch.baddbmm(bias[:, None].to(x.dtype), weight, x)
