"""The bases that forwards started from which activation checkpointing runs again, in any order, during a backward."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ema_attention._torch import has_values, saved_tensors_hooks

_LIMIT = 64
"""Forwards whose bases are kept: nobody says when one without a graph will not be run again."""
_NOISE = 0.05
"""The largest relative difference of an input that is computed again, which a GPU need not do to the last bit."""


class _Start(NamedTuple):
    sample: Tensor
    """Of the forward's input."""
    mu: Tensor
    graph: Callable[[], object] | None
    """Not None as long as the graph lives that would run the forward again; None itself where nothing tells."""


class Starts:
    """What the forwards of a unit started from, to be found again by their input."""

    def __init__(self) -> None:
        self._kept: deque[_Start] = deque(maxlen=_LIMIT)  # the newest last, but one that was found is the first
        self._has_forgotten = False

    def keep(self, x: Tensor, mu: Tensor) -> None:
        """Keeps the bases mu that a forward of x (B, C, N) starts from, if it may be run again.

        It may where a hook takes what the graph would save, and where there is no graph, as in a reentrant checkpoint.
        """
        hooks = saved_tensors_hooks() if has_values(x) else None
        if hooks is None:
            return
        self._drop_dead()
        self._has_forgotten |= len(self._kept) == _LIMIT
        self._kept.append(_Start(_sample(x), mu, weakref.ref(hooks[1]) if hooks else None))

    def find(self, x: Tensor) -> Tensor | None:
        """The bases that the forward of x (B, C, N) started from; None if it is not one that was kept.

        Raises:
            RuntimeError: if nothing tells which forward is run again.
        """
        self._drop_dead()
        if not has_values(x) or not (self._kept or self._has_forgotten):
            return None
        sample = _sample(x)
        alike = sample.shape, sample.device
        starts = [start for start in self._kept if (start.sample.shape, start.sample.device) == alike]
        differences = torch.stack([sample, *(start.sample - sample for start in starts)])
        size, *distances = differences.abs().flatten(1).sum(1).tolist()  # one wait for a GPU
        nearest = min(distances, default=torch.inf)
        if nearest > _NOISE * size:
            if self._has_forgotten:
                raise RuntimeError(
                    "EMAUnit cannot tell whether this forward inside a backward is one that is run again; it keeps the "
                    f"bases of the latest {_LIMIT}"
                )
            return None
        nearest_starts = [start for start, distance in zip(starts, distances, strict=True) if distance == nearest]
        if saved_tensors_hooks():  # a checkpoint that is not reentrant runs it again, and its graph is alive
            nearest_starts = [start for start in nearest_starts if start.graph] or nearest_starts
        found = nearest_starts[-1]
        if any(start.graph and found.graph and not torch.equal(start.mu, found.mu) for start in nearest_starts):
            raise RuntimeError(
                "a checkpointed EMAUnit needs another input in each forward before a backward; got the same one twice"
            )
        self._kept = deque([found, *(start for start in self._kept if start is not found)], _LIMIT)
        return found.mu

    def _drop_dead(self) -> None:
        alive = (start for start in self._kept if start.graph is None or start.graph() is not None)
        self._kept = deque(alive, _LIMIT)


def _sample(x: Tensor) -> Tensor:
    """Some of the elements of x (B, C, N), from everywhere in it."""
    _, channels, positions = x.shape
    sample = x.detach()[:, :: channels // 16 + 1, :: positions // 64 + 1].float().clone()
    return sample.nan_to_num()  # a distance from what is not finite says nothing
