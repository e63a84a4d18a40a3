"""What one process at a time may write."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

if sys.platform == "win32":
    import msvcrt

    def _lock(file: BinaryIO) -> None:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(file: BinaryIO) -> None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, no lock of processes forked from this one


@contextmanager
def held(lock: Path, meaning: str) -> Iterator[Callable[[], bool]]:
    """Holds a lock file to the end of this process, or of the context; yields a function that tells whether the file is
    still there, and still the same one.

    The system's lock dies with its process, however that dies. So a file that was left behind keeps nobody out. The
    lock is the process's: on POSIX, a second ``held`` of the file in this process is not refused, and its end frees
    the lock of the first.

    Args:
        lock: the file, made where it is missing and removed at the end.
        meaning: what it stands for, in the message of an error.

    Raises:
        ValueError: if another process holds it, or it cannot be made.
    """
    with _locked(lock, meaning) as file:
        try:
            yield lambda: _is_at(file, lock)
        finally:
            if _is_at(file, lock):
                with suppress(OSError):  # Windows removes no open file
                    lock.unlink()


def _locked(lock: Path, meaning: str) -> BinaryIO:
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "ab")  # noqa: SIM115
    except OSError as error:
        raise ValueError(f"cannot write {lock}: {error.strerror}") from error
    try:
        _lock(file)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            file.close()
            raise ValueError(f"another process is writing {meaning}: one at a time") from None
        warnings.warn(  # some network drives have no locks
            f"cannot lock {lock} ({error.strerror}): start nothing else that writes {meaning}", stacklevel=4
        )
    if not _is_at(file, lock):  # who held it has just removed it
        file.close()
        return _locked(lock, meaning)
    return file


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False
