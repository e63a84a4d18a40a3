"""Checkpoints: written whole or not at all, read without running code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from examples.emanet.model import EMANet, emanet


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
        part.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Raises ValueError, with the file's name, for one that is missing, broken or no checkpoint."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    except Exception as error:  # torch.load has many ways to say that a file is not one of its own
        raise ValueError(f"cannot read the checkpoint {path}: torch.load finds no tensors in it") from error
    if not isinstance(checkpoint, dict) or "model" not in checkpoint:
        raise ValueError(f"{path} must be a checkpoint that training wrote; it holds something else")
    return checkpoint


def load_network(path: Path) -> tuple[EMANet, dict[str, Any]]:
    """The network of a checkpoint that ``examples.emanet.train`` wrote, in eval mode, and what else is in the file."""
    checkpoint = load_checkpoint(path)
    model = emanet(**checkpoint["network"])
    model.load_state_dict(checkpoint["model"])
    return model.eval(), checkpoint
