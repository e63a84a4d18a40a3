"""Time and memory of each block against the number of positions, up to a limit of either."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.blocks import Block
from benchmarks.measure import Mode, exponent, extrapolate, interleaved, memory, prepare, summary, synchronize

LONG = 2.0
"""Seconds: in a call of this length the profiler's microseconds for each operator do not matter."""


def grow(
    block: Block,
    mode: Mode,
    channels: int,
    sides: tuple[int, ...],
    *,
    bytes_limit: float,
    seconds_limit: float,
    seconds: float = 0.0,
    device: str = "cpu",
    progress: tqdm | None = None,
) -> dict:
    """Measures ``block`` at one sample of each of ``sides``, ascending, until the next size would pass a limit.

    Each size is timed for at least ``seconds``, and at least once. A call that takes ``LONG`` is timed while its
    memory is recorded, and not repeated.

    What the next size takes is predicted from the sizes before it (:func:`extrapolate`), so nothing really runs out
    of memory.

    Returns:
        ``points``, a list of ``{"n", "seconds", "bytes"}``: seconds are a :func:`summary`, bytes the peak without the
        input. And ``stopped``: why there are no more points, or None.
    """
    points: list[dict] = []
    for side in sides:
        n = side**2
        if progress is not None:
            progress.set_postfix_str(f"N = {n:,}")
        if points:
            bytes_ahead = extrapolate([(p["n"], p["bytes"]) for p in points], n)
            seconds_ahead = extrapolate([(p["n"], p["seconds"]["median"]) for p in points], n)
            if bytes_ahead > bytes_limit:
                reason = f"out of memory at N = {n:,}: {bytes_ahead / 1e9:.1f} GB"
                return {"points": points, "stopped": reason}
            if seconds_ahead > seconds_limit:
                return {"points": points, "stopped": f"out of time at N = {n:,}: {seconds_ahead:.0f} s"}
        call = prepare(block.make(channels), (1, channels, side, side), mode, device=device)
        if n < 20_000:  # larger sizes take so long that the cost of a first call does not matter
            call()
        samples: list[float] = []
        taken = memory(_timed(call, samples, device), device)
        if samples[0] < LONG:
            samples = interleaved({"call": call}, seconds=seconds, least=1, warm=True, device=device)["call"]
        points.append({"n": n, "seconds": summary(samples), "bytes": taken.peak})
        del call
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
    return {"points": points, "stopped": None}


def _timed(call: Callable[[], Tensor], samples: list[float], device: str) -> Callable[[], Tensor]:
    """``call``, which also appends the seconds it takes to ``samples``."""

    def timed() -> Tensor:
        synchronize(device)
        start = time.perf_counter()
        out = call()
        synchronize(device)
        samples.append(time.perf_counter() - start)
        return out

    return timed


def exponents(growth: dict) -> dict[str, float | None]:
    """The fitted exponents of N in time and memory over the last three sizes; None where there are fewer."""
    points = growth["points"][-3:]
    if len(points) < 3:
        return {"seconds": None, "bytes": None}
    return {
        "seconds": exponent([(p["n"], p["seconds"]["median"]) for p in points]),
        "bytes": exponent([(p["n"], p["bytes"]) for p in points]),
    }
