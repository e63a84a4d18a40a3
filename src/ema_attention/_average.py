"""The average of the bases that EM found in a batch, over its samples and over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def average_over_batch(mu: Tensor, z: Tensor) -> Tensor:
    """The average (1, C', K) of the bases mu (B, C', K) over the batch; NaN if the maps z (B, N, K) are not finite."""
    return mu.mean(0, keepdim=True) + _zero_if_finite(mu, z)


def average_over_ranks(mu: Tensor, z: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The same over the batches of all ranks that are finite; NaN if none is."""
    is_finite = _zero_if_finite(mu, z) == 0
    count = torch.where(is_finite, float(len(mu)), 0.0).to(mu.dtype)
    total = torch.where(is_finite, mu.sum(0, keepdim=True), 0.0)
    pooled = torch.cat([total.flatten(), count[None]])
    dist.all_reduce(pooled, group=group)
    return pooled[:-1].view_as(total) / pooled[-1]


def _zero_if_finite(mu: Tensor, z: Tensor) -> Tensor:
    """0, or NaN: x that is not finite anywhere shows in the maps."""
    return z.sum(dtype=mu.dtype) * 0
