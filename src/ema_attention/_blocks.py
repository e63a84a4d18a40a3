"""Tensors (B, *, N) in blocks of positions that stay in cache."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ema_attention._torch import is_only_data

_BYTES = 512 * 1024
"""Of a block in one sample. What a block needs on the way stays in an L2 cache, and no N×C temporary is written.

Smaller blocks save memory and take time: a CPU's convolution copies its weights at each call.
"""


def by_blocks(function: Callable[..., Tensor], *tensors: Tensor, result: Callable[[], Tensor]) -> Tensor:
    """The results of ``function`` on blocks of positions of tensors (B, *, N), put together in a new ``result``.

    All positions are one block on a GPU, which has no need of more, and under a transform such as vmap, which could
    not write a result that it maps over into one that it does not.
    """
    _, channels, positions = tensors[0].shape
    size = max(64, _BYTES // (channels * tensors[0].element_size()) // 64 * 64)
    is_one = not all(tensor.device.type == "cpu" and is_only_data(tensor) for tensor in tensors)
    if is_one or positions <= size:
        return function(*tensors)
    whole = result()
    blocks = zip(*(tensor.split(size, 2) for tensor in tensors), strict=True)
    for part, block in zip(whole.split(size, 2), blocks, strict=True):
        part.copy_(function(*block))
    return whole
