"""Any layout to (B, C, N) and back, and to the image that a module made for images gets."""

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

    def image(self, y: Tensor) -> Tensor:
        """A tensor (B, C, N) as (B, C, H, W): as it was, or where that was no image with all positions in one row.

        Not in one column: from channels-last memory that makes a stride for which BatchNorm2d's gradient is wrong on a
        CPU (PyTorch 2.14 and 2.15; test_unit_equals_its_formula).
        """
        return self.restore_maps(y) if len(self.spatial) == 2 else y.unsqueeze(2)

    def restore_image(self, y: Tensor) -> Tensor:
        """An :meth:`image` in the layout."""
        return y.movedim(1, self.channel_dim) if len(self.spatial) == 2 else self.restore(y.squeeze(2))

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
