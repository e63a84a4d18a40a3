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
        return move_dimension(self.restore_maps(y), 1, self.channel_dim)

    def image(self, y: Tensor) -> Tensor:
        """A tensor (B, C, N) as (B, C, H, W): in the shape that it had, or, where that was no image, in one row."""
        return self.restore_maps(y) if len(self.spatial) == 2 else self.row(y)

    @staticmethod
    def row(y: Tensor) -> Tensor:
        """A tensor (B, C, N) as an image of one row (B, C, 1, N).

        Not of one column: from channels-last memory that makes a stride for which BatchNorm2d's gradient is wrong, see
        :func:`~ema_attention._torch.mend_batch_stride`.
        """
        return y.unsqueeze(2)

    def restore_maps(self, z: Tensor) -> Tensor:
        """Maps (B, K, N) as (B, K, *spatial), wherever the channels are."""
        return z.view(*z.shape[:2], *self.spatial)  # coremltools' unflatten knows no dynamic sizes


def flatten(x: Tensor, channel_dim: int = 1) -> tuple[Tensor, Layout]:
    """View (or copy) of x as (B, C, N), and the layout that undoes it."""
    x = move_dimension(x, channel_dim, 1)
    return x.flatten(2), Layout(channel_dim, x.shape[2:])


def move_dimension(x: Tensor, source: int, destination: int) -> Tensor:
    """What ``x.movedim(source, destination)`` gives, by an operation that every exporter knows."""
    if source == destination:
        return x
    order = list(range(x.dim()))
    # By order.index, which gives a number that is known: PyTorch 2.6 traces an int that is an argument as unknown.
    source, destination = (order.index(i % x.dim()) for i in (source, destination))
    order.insert(destination, order.pop(source))
    return x.permute(order)


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of x (B, C, N) lie next to each other in memory."""
    return x.stride(1) < x.stride(2)
