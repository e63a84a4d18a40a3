"""Files that are whole or not there, and checkpoints among them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

if TYPE_CHECKING:  # who writes no figures needs no matplotlib
    from matplotlib.figure import Figure


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Yields a new file in the folder of ``path``, and gives it that name at the end.

    Whenever the process stops, ``path`` is the old file or the whole new one. A folder that is missing is made.

    Raises:
        ValueError: with the file's name, if it cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def write_figure(figure: Figure, path: Path) -> None:
    """Writes a figure in the format of the name's ending, or as PNG if it has none."""
    with written_whole(path) as file:
        figure.savefig(file, format=path.suffix[1:] or "png")


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a dict of tensors, numbers, strings, and containers of them."""
    with written_whole(path) as file:
        torch.save(checkpoint, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The dict in a file, read without running code.

    Raises:
        ValueError: with the file's name, for one that is missing or broken, or holds more than data.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise ValueError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    except Exception as error:  # torch.load has many ways to say that a file is not one of its own
        raise ValueError(f"cannot read the checkpoint {path}: it is broken, or not of tensors alone") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} must be a checkpoint, a dict; got a {type(checkpoint).__name__}")
    return checkpoint
