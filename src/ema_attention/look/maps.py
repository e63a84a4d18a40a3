"""Attention maps of units anywhere inside a model."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ema_attention.modules import EMAUnit, MapCollector

__all__ = ["collect_attention_maps"]

_collectors_lock = threading.Lock()
"""Held while units' lists of collectors change: contexts of several threads may do so at once."""


@contextmanager
def collect_attention_maps(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    r"""Collects the attention maps of every :class:`EMAUnit` in ``model`` while the context is open.

    Yields a dict that fills as the model runs: from the unit's name in ``model.named_modules()`` to its
    maps z, (B, K, \*spatial), those of its latest call, detached. ``maps["head.unit"][0, k]`` is the map
    of basis k over the first sample. A context collects what its own thread runs (of compiled code, what any thread
    runs).

    Warns if nothing was collected, which is so where a framework ran a copy of the model.

    Raises:
        ValueError: if there is no ``EMAUnit`` in the model.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), EMAUnit(8, num_bases=4))
        >>> with collect_attention_maps(model) as maps:
        ...     _ = model(torch.randn(2, 3, 10, 10))
        >>> {name: tuple(z.shape) for name, z in maps.items()}
        {'1': (2, 4, 8, 8)}
    """
    units = {name: module for name, module in model.named_modules() if isinstance(module, EMAUnit)}
    if not units:
        raise ValueError(f"the model must contain an EMAUnit; got a {type(model).__name__} without one")
    maps: dict[str, Tensor] = {}
    thread = threading.get_ident()
    with _collectors_lock:
        for name, unit in units.items():
            unit.map_collectors.append(MapCollector(maps, name, thread))
    try:
        yield maps
    finally:
        with _collectors_lock:
            for unit in units.values():
                unit.map_collectors = [collector for collector in unit.map_collectors if collector.maps is not maps]
    if not maps:
        warnings.warn(
            f"collect_attention_maps saw no unit of this {type(model).__name__} run in its thread; did a copy run?",
            stacklevel=3,
        )
