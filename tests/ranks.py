"""A function on several gloo processes of one machine."""

import contextlib
import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")  # one process imports what is slow, and every rank is a fork
CONTEXT.set_forkserver_preload(["torch", "torch.distributed.fsdp", "ema_attention", "examples.emanet.train"])


def run_on_ranks(function: Callable[[], Any], ranks: int, folder: Path) -> list[Any]:
    """What ``function`` returns on each of ``ranks`` gloo processes."""
    processes = [CONTEXT.Process(target=_rank, args=(function, rank, ranks, folder)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    results = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    failures = [result["failure"] for result in results if "failure" in result]
    if failures:
        raise AssertionError("\n".join(failures))
    return [result["value"] for result in results]


def _rank(function: Callable[[], Any], rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = dist.FileStore(str(folder / "store"), ranks)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.device_count() >= ranks else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=20))
        result = {"value": function()}
    except Exception:
        result = {"failure": f"rank {rank}: {traceback.format_exc()}"}
    torch.save(result, folder / f"{rank}.pt")
    if "value" in result:  # one that failed leaves: the others must not wait for it
        with contextlib.suppress(RuntimeError):
            dist.barrier()
    dist.destroy_process_group()
