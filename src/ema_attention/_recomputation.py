"""The bases that forwards started from which activation checkpointing runs again, in any order, during a backward."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import weakref
from collections import deque
from dataclasses import dataclass

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor
from torch.utils._python_dispatch import (
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
    is_traceable_wrapper_subclass,
)

from ema_attention._torch import HAS_TOP_HOOKS, has_values, is_tracing, saved_tensors_hooks, without_autocast

_LIMIT = 64
"""Forwards without a graph whose bases are kept: nobody says when one of them will not be run again."""
_NOISE = 0.05
"""The largest relative difference of an input that is computed again, which a GPU need not do to the last bit."""


_NO_BACKWARD = -1
"""What PyTorch's number of a backward is where there is none."""


@dataclass(frozen=True, eq=False)
class _Start:
    sample: Tensor
    """Of the forward's input."""
    mu: Tensor
    checkpoints: weakref.WeakKeyDictionary[object, int]
    """The checkpoints that the forward ran in, while they live, each with the backward in which it ran again last.

    There are none to be had of reentrant ones.
    """


class Starts:
    """What the forwards of a unit started from, to be found again by their input."""

    def __init__(self) -> None:
        self._of_checkpoints: list[_Start] = []
        self._without_graph: deque[_Start] = deque(maxlen=_LIMIT)  # perhaps of reentrant checkpoints
        self._has_forgotten = False

    def keep(self, x: Tensor, mu: Tensor) -> None:
        """Keeps the bases mu that a forward of x (B, C, N) starts from, if it may be run again.

        It may in a checkpoint, and where there is no graph, as inside a reentrant one.
        """
        if not has_values(x):
            return
        checkpoints = _checkpoints()
        has_graph = torch.is_grad_enabled() and HAS_TOP_HOOKS
        if has_graph and not checkpoints:
            return
        start = _Start(_sample(x), mu, weakref.WeakKeyDictionary(dict.fromkeys(checkpoints, _NO_BACKWARD)))
        if checkpoints:
            self._drop_dead()
            self._of_checkpoints.append(start)
        if not has_graph:  # even in a checkpoint, which may end before a reentrant one inside of it
            self._has_forgotten |= len(self._without_graph) == _LIMIT
            self._without_graph.append(start)

    def find(self, x: Tensor) -> Tensor | None:
        """The bases that the forward of x (B, C, N) started from; None if that is not one that is run again.

        Raises:
            RuntimeError: if nothing tells which forward is run again.
        """
        checkpoints, is_in_reentrant = _checkpoints(), _is_in_reentrant_checkpoint()
        if not (checkpoints or is_in_reentrant or not HAS_TOP_HOOKS) or not has_values(x):
            return None
        self._drop_dead()
        kept = self._of_checkpoints
        known = next((one for one in checkpoints if any(one in start.checkpoints for start in kept)), None)
        if known is not None:  # it runs again once in a backward, its forwards in the order in which they ran
            backward = torch._C._current_graph_task_id()
            of_this = [start for start in kept if known in start.checkpoints]
            found = next((start for start in of_this if start.checkpoints[known] != backward), of_this[0])
            found.checkpoints[known] = backward
            return found.mu
        starts = _with_input(x, list(dict.fromkeys([*kept, *self._without_graph])))
        if not starts and self._has_forgotten:
            raise RuntimeError(
                f"a checkpointed EMAUnit can run its latest {_LIMIT} forwards again; got the input of none of them"
            )
        if not starts and is_in_reentrant:
            raise RuntimeError(
                "an EMAUnit in a reentrant checkpoint must get the same input when it runs again; got another one "
                "(random layers before it need preserve_rng_state=True)"
            )
        if not starts:
            return None
        if checkpoints:  # in a new one, inside of a reentrant one that is run again
            found = starts[0]
            if not all(torch.equal(start.mu, found.mu) for start in starts):
                raise RuntimeError(
                    "a checkpoint of an EMAUnit inside of a reentrant one needs another input in each forward; "
                    "got the same one twice"
                )
        else:
            found = starts[-1]  # the newest, as backward runs them
            if found in self._without_graph:
                self._without_graph.remove(found)
                self._without_graph.appendleft(found)
        return found.mu

    def _drop_dead(self) -> None:
        self._of_checkpoints = [start for start in self._of_checkpoints if start.checkpoints]


def _with_input(x: Tensor, starts: list[_Start]) -> list[_Start]:
    """Those of the forwards whose input was x (B, C, N), in their order."""
    sample = _sample(x)
    alike = sample.shape, sample.device
    starts = [start for start in starts if (start.sample.shape, start.sample.device) == alike]
    differences = torch.stack([sample, *(start.sample - sample for start in starts)])
    size, *distances = differences.abs().flatten(1).sum(1).tolist()  # one wait for a GPU
    nearest = min(distances, default=torch.inf)
    if nearest > _NOISE * size:
        return []
    return [start for start, distance in zip(starts, distances, strict=True) if distance == nearest]


def _sample(x: Tensor) -> Tensor:
    """Sums (B, 4, 4) over all of x (B, C, N), with weights that repeat nowhere: hardly two inputs have the same."""
    while is_traceable_wrapper_subclass(x):  # such as DTensor
        x = getattr(x, x.__tensor_flatten__()[0][0])
    x = x.detach().float().nan_to_num(0.0, 0.0, 0.0)  # of what is not finite a sum says nothing
    frequencies = torch.tensor([2.0, 3.0, 5.0, 7.0], dtype=x.dtype, device=x.device).sqrt()
    left, right = (torch.outer(torch.arange(n, device=x.device), frequencies).cos() for n in x.shape[1:])
    with without_autocast(x.device):
        return (left.mT @ (x @ right)).nan_to_num(0.0, 0.0, 0.0)  # sums may overflow


def _checkpoints() -> list[object]:
    """The calls of torch.utils.checkpoint in which the code runs, or runs again, the innermost first.

    All of them may run a forward again, and one that has nothing to save dies before the others. Reentrant ones are not
    among them. PyTorch has no name for a call. Its hooks on saved tensors hold the call's frame in their closures.
    Between them there may be others, such as those of torch.autograd.graph.save_on_cpu.
    """
    frames: list[object] = []
    for hook in itertools.chain.from_iterable(saved_tensors_hooks()):
        hook = inspect.unwrap(hook)
        cells = (
            dict(zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=True))
            if inspect.isfunction(hook)
            else {}
        )
        if "target_frame_ref" in cells:
            frames.append(cells["target_frame_ref"].cell_contents())
        elif "frame" in cells and isinstance(cells["frame"].cell_contents, torch_checkpoint._CheckpointFrame):
            frames.append(cells["frame"].cell_contents)
    return [frame for frame in dict.fromkeys(frames) if frame is not None]


def _is_in_reentrant_checkpoint() -> bool:
    """Whether a reentrant checkpoint runs again, by the name that its Function has in PyTorch and elsewhere."""
    return "CheckpointFunction" in type(torch._C._current_autograd_node()).__name__


def outside_selective_checkpoint() -> contextlib.AbstractContextManager[object]:
    """Keeps operations from a selective checkpoint, which takes every one for a part of what it runs again."""
    if is_tracing():
        return contextlib.nullcontext()
    kinds = torch_checkpoint._CachingTorchDispatchMode, torch_checkpoint._CachedTorchDispatchMode
    is_selective = torch._C._len_torch_dispatch_stack() and any(
        isinstance(mode, kinds) for mode in _get_current_dispatch_mode_stack()
    )
    return _disable_current_modes() if is_selective else contextlib.nullcontext()
