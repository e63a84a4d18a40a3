"""The processes of a training: joining them, sharing among them, and stopping all after the same step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from torch import nn


def rank_and_ranks() -> tuple[int, int]:
    """The number of this process and of all that train together: (0, 1) for one alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Joins the processes that torchrun has started, if it has, and yields the device of this one."""
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        yield torch.device("cuda" if cuda else "cpu")
        return
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=1))  # a download may take so long
    try:
        yield device
    finally:
        dist.destroy_process_group()


@contextmanager
def first_process_ahead() -> Iterator[bool]:
    """Lets the first process of every machine go ahead with what is inside, and yields whether this is one."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if dist.is_initialized() and not is_first:
        dist.barrier()
    try:
        yield is_first
    finally:  # also after an error: the others have it too, and say so, instead of waiting
        if dist.is_initialized() and is_first:
            dist.barrier()


@contextmanager
def failing_together() -> Iterator[None]:
    """Raises in every process the ValueError that what is inside has raised in one, so that none waits for it."""
    failure = None
    try:
        yield
    except ValueError as error:
        if not dist.is_initialized():
            raise
        failure = str(error)
    if dist.is_initialized():
        failures: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
        if first := next(filter(None, failures), None):
            raise ValueError(first)


def share_buffers(model: nn.Module) -> None:
    """Gives every process the first one's running statistics (SyncBatchNorm's are equal already)."""
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C or SIGTERM has come; a second one interrupts as ever."""
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore_handlers() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        restore_handlers()

    for number in handlers:
        signal.signal(number, note)
    try:
        yield lambda: bool(came)
    finally:
        restore_handlers()


def agree(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up in any process, so that all of them stop after the same step."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags.item())
