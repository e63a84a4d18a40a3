"""Tensors (B, *, N) in blocks of positions that stay in cache."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ema_attention._torch import is_only_data

_POSITIONS = 512
"""Of 512 float32 channels they fill an L2 cache of 1 MB.

Measured there: 0.8 of the time of all positions at once for (1, 512, 65, 65), and no N×C temporary.
"""


def by_blocks(function: Callable[..., Tensor], *tensors: Tensor, result: Callable[[], Tensor]) -> Tensor:
    """The results of ``function`` on blocks of positions of tensors (B, *, N), put together in a new ``result``.

    All positions are one block on a GPU, which has no need of more, and under a transform such as vmap, which could
    not write a result that it maps over into one that it does not.
    """
    is_one = not all(tensor.device.type == "cpu" and is_only_data(tensor) for tensor in tensors)
    if is_one or tensors[0].shape[2] <= _POSITIONS:
        return function(*tensors)
    whole = result()
    blocks = zip(*(tensor.split(_POSITIONS, 2) for tensor in tensors), strict=True)
    for part, block in zip(whole.split(_POSITIONS, 2), blocks, strict=True):
        part.copy_(function(*block))
    return whole
