"""Any layout to (B, C, N) and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """How a tensor was laid out before :func:`flatten`; it undoes that."""

    channel_dim: int
    spatial: torch.Size

    def restore(self, y: Tensor) -> Tensor:
        """A tensor (B, C, N) in the layout; C need not be what it was."""
        return self.restore_maps(y).movedim(1, self.channel_dim)

    def restore_maps(self, z: Tensor) -> Tensor:
        """Maps (B, K, N) as (B, K, *spatial), wherever the channels are."""
        unflattened: Tensor = z.unflatten(2, self.spatial)
        return unflattened


def flatten(x: Tensor, channel_dim: int = 1) -> tuple[Tensor, Layout]:
    """View (or copy) of x as (B, C, N), and the layout that undoes it."""
    x = x.movedim(channel_dim, 1)
    return x.flatten(2), Layout(channel_dim, x.shape[2:])


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of x (B, C, N) lie next to each other in memory."""
    return x.stride(1) < x.stride(2)
