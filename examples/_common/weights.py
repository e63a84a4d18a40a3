"""Weights from the files of others, loaded into a module."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten

from torch import Tensor, nn

from examples._common.files import load_checkpoint


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state_dict in a file. Raises ValueError, with the file's name, if there is none."""
    state = load_checkpoint(path)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path} must hold a state_dict, tensors by their names; {name} is no tensor")
    return state


def load_weights(module: nn.Module, state: dict[str, Tensor], source: object, what: str) -> None:
    """Loads a state_dict. Raises ValueError, with its source and what it must be the weights of, if it does not fit."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).split("\n\t")[:2][-1]  # the first of many
        raise ValueError(f"{source} must hold the weights of {what}: {shorten(reason, 200)}") from error


def load_in_order(module: nn.Module, state: dict[str, Tensor], source: object, what: str) -> None:
    """Loads a state_dict whose names are not the module's, and whose order is. Raises as :func:`load_weights`."""
    ours, theirs = (
        [name for name in names if not name.endswith("num_batches_tracked")] for names in (module.state_dict(), state)
    )
    ends = [[name.rpartition(".")[2] for name in names] for names in (ours, theirs)]  # weight, bias, running_mean, ...
    if ends[0] != ends[1]:
        raise ValueError(f"{source} must hold the weights of {what}, in its order; it has other tensors")
    load_weights(module, {our: state[their] for our, their in zip(ours, theirs, strict=True)}, source, what)
