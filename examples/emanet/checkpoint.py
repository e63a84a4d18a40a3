"""Checkpoints: written whole or not at all, read without running code."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes it beside its place, then moves it there, so that ``path`` is always a whole file, the old or the new."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise ValueError(f"cannot write the checkpoint {path}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Raises ValueError, with the file's name, for one that is missing or broken, or holds more than data."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise ValueError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    except Exception as error:  # torch.load has many ways to say that a file is not one of its own
        raise ValueError(f"cannot read the checkpoint {path}: it is broken, or not of tensors alone") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} must be a checkpoint, a dict; got a {type(checkpoint).__name__}")
    return checkpoint
