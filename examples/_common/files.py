"""Files that are whole or not there, and checkpoints among them."""

from __future__ import annotations

import hashlib
import os
import secrets
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

if TYPE_CHECKING:  # who writes no figures needs no matplotlib
    from matplotlib.figure import Figure


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Yields a new file in the folder of ``path``, and gives it that name at the end.

    Whenever the process stops, ``path`` is the old file or the whole new one. A folder that is missing is made. Where
    ``path`` is a link, the file that it points to is written.

    Raises:
        ValueError: with the file's name, if it cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise ValueError(f"cannot write {path}: it is there, and no file")
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")  # no other process writes this one
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def remove_parts(*paths: Path) -> None:
    """Removes what processes that were killed had written of these files. None may be writing them now."""
    for path in map(Path, map(os.path.realpath, paths)):  # as written_whole has named them
        for part in path.parent.glob(f".{path.name}.*.part"):
            part.unlink(missing_ok=True)


def write_figure(figure: Figure, path: Path) -> None:
    """Writes a figure in the format of the name's ending, or as PNG if it has none."""
    with written_whole(path) as file:
        figure.savefig(file, format=path.suffix[1:] or "png")


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a dict of tensors, numbers, strings, and containers of them, with a digest of every byte.

    The digest is the comment of the zip file that ``torch.save`` writes: whatever reads the one reads the other.
    """
    with written_whole(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # PyTorch's writer, at its own end, of the error that the file has raised
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        file.seek(-2, os.SEEK_END)  # the length of the comment is what a zip file ends with
        file.write(COMMENT_LENGTH.to_bytes(2, "little"))
        file.write(_comment(file, file.tell()))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The dict in a file, read without running code.

    Raises:
        ValueError: with the file's name, for one that is missing or broken, or holds more than data.
    """
    try:
        checkpoint = load_whole(path)
    except OSError as error:
        raise ValueError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except Exception as error:  # torch.load has many ways to say that a file is not one of its own
        raise ValueError(f"cannot read the checkpoint {path}: it is broken, or not of tensors alone") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} must be a checkpoint, a dict; got a {type(checkpoint).__name__}")
    return checkpoint


def load_whole(path: Path | str) -> Any:
    """What ``torch.save`` has written, on the CPU, if its bytes are those that were written.

    :func:`save_checkpoint` writes a digest of all of them. Other zip files have the CRC-32 of every record, which
    PyTorch writes and does not check. Its format before version 1.6 has no sums.

    Raises:
        zipfile.BadZipFile: if a digest or a sum is another.
        Exception: what else ``torch.load`` raises.
    """
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # as torch.load decides
        end = max(file.seek(0, os.SEEK_END) - COMMENT_LENGTH, 0)
        file.seek(end)
        comment = file.read()
        if comment.startswith(DIGEST):
            if comment != _comment(file, end):
                raise zipfile.BadZipFile("its SHA-256 is not the one that it was written with")
        elif is_zip:
            with zipfile.ZipFile(file) as records:
                # PyTorch leaves a tensor's memory as it is where the record is marked as a folder
                if records.testzip() or any(record.external_attr & 0x10 for record in records.infolist()):
                    raise zipfile.BadZipFile("a CRC-32 is not the one that it was written with")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


DIGEST = b"SHA-256:"
COMMENT_LENGTH = len(DIGEST) + 64


def _comment(file: BinaryIO, end: int) -> bytes:
    """The comment of a checkpoint: the digest of the bytes before it."""
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(min(1 << 20, end - file.tell())):
        digest.update(block)
    return DIGEST + digest.hexdigest().encode()


def first_not_finite(state: dict[str, Tensor]) -> str | None:
    """The name of the first tensor with a value that is infinite or not a number."""
    return next((name for name, value in state.items() if not value.isfinite().all()), None)
