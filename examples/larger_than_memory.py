"""EM attention of one sample that lies on disk, in the memory of one tile, and resumable after being killed.

    python -m examples.larger_than_memory out --positions 100_000_000

The features are FOLDER/features.npy, (N, C) float32, one row a position. If the file is not there, it is made up.
The reconstruction goes to FOLDER/out.npy, of the same shape, and the bases to FOLDER/bases.npy, (C, K). The state is
saved every few seconds: after a run was killed, the same command goes on from the last state. After its end there is
nothing left to do, and another setting starts a new run. Until the end of that the old results stay.
"""

import argparse
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.format import (
    header_data_from_array_1_0,
    open_memmap,
    read_array_header_1_0,
    read_magic,
    write_array_header_1_0,
)
from tqdm import tqdm

from ema_attention import TiledEMAttention
from examples._common.files import load_checkpoint, remove_parts, save_checkpoint, written_whole
from examples._common.locks import held

SECONDS_BETWEEN_SAVES = 5.0
MATERIALS = 12  # what the made-up features are made of


def make_features(path: Path, positions: int, channels: int, tile: int) -> None:
    """Rows of a few directions with noise, written as a .npy file tile after tile."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((MATERIALS, channels), np.float32)
    with written_whole(path) as file:
        write_header(file, positions, channels)
        for start in tqdm(range(0, positions, tile), desc="making features", unit="tile"):
            rows = directions[rng.integers(MATERIALS, size=min(tile, positions - start))]
            rows += 0.5 * rng.standard_normal(rows.shape, np.float32)
            file.write(rows)


def write_header(file: BinaryIO, positions: int, channels: int) -> None:
    """What a .npy file of (N, C) float32 starts with."""
    header = header_data_from_array_1_0(np.empty((0, 0), np.float32))
    write_array_header_1_0(file, {**header, "shape": (positions, channels)})


def open_features(path: Path) -> np.memmap:
    """The features (N, C). Raises ValueError if the file holds others."""
    try:
        rows = open_memmap(path, "r")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the features {path}: {error}") from None
    if rows.ndim != 2 or rows.dtype != np.float32:
        raise ValueError(f"{path} must hold (N, C) float32; got {rows.shape} {rows.dtype}")
    return rows


def read_tile(path: Path, start: int, size: int) -> torch.Tensor:
    """Positions ``start`` to ``start + size`` as (1, C, size), copied: pages that stay mapped count as memory."""
    rows = np.array(open_features(path)[start : start + size])
    return torch.from_numpy(rows).T[None]


def write_tile(file: BinaryIO, start: int, tile: torch.Tensor) -> None:
    """Writes positions from ``start`` on, after the header."""
    rows = np.ascontiguousarray(tile[0].T.numpy())
    file.seek(0)
    read_magic(file)
    read_array_header_1_0(file)
    file.seek(start * rows[0].nbytes, os.SEEK_CUR)
    file.write(rows)


def flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def describe_file(path: Path) -> str:
    """What changes with the contents of a file, and costs no pass over them. Raises ValueError if there is none."""
    try:
        facts = path.stat()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    return f"{facts.st_size:,} bytes, last changed {datetime.fromtimestamp(facts.st_mtime).isoformat(' ')}"


def restore(em: TiledEMAttention, path: Path, settings: dict[str, Any]) -> tuple[int, int]:
    """Loads the state of a run, and returns its pass and position; (0, 0), if there is none to go on from.

    Raises:
        ValueError: if the file holds no such state, or that of an unfinished run with other settings.
    """
    if not path.exists():
        return 0, 0
    state = load_checkpoint(path)
    if not {"settings", "em", "stage", "start"} <= state.keys():
        raise ValueError(f"{path} must hold the state of a run; it has only {', '.join(map(str, state))}")
    for name, value in settings.items():
        theirs = state["settings"].get(name)
        if theirs != value:
            if state["stage"] > state["settings"]["stages"]:  # it was finished
                return 0, 0
            raise ValueError(
                f"{path} is of a run with {name} = {theirs}; got {name} = {value}: remove it to start anew"
            )
    em.load_state_dict(state["em"])
    return state["stage"], state["start"]


def attend(folder: Path, bases: int, stages: int, tile: int) -> Iterator[tuple[str, int, float]]:
    """Computes out.npy and bases.npy; yields, for each tile, the name of the pass, its positions and its seconds."""
    features, out, state_file = folder / "features.npy", folder / "out.npy", folder / "state.pt"
    unfinished = folder / "out.unfinished.npy"
    positions, channels = open_features(features).shape
    settings = {"features": describe_file(features), "bases": bases, "stages": stages, "tile": tile}
    generator = torch.Generator().manual_seed(0)
    em = TiledEMAttention(F.normalize(torch.randn(channels, bases, generator=generator), dim=0))
    first_stage, start = restore(em, state_file, settings)
    if first_stage > stages:
        if out.exists() and (folder / "bases.npy").exists():
            print(f"{folder}: out.npy and bases.npy are there already", flush=True)
            return
        first_stage, start = stages, 0
    if first_stage == stages and not (unfinished.exists() and unfinished.stat().st_size > 4 * channels * start):
        start = 0
    if (first_stage, start) != (0, 0):
        print(f"going on in pass {first_stage + 1} of {stages + 1}, at position {start:,}", flush=True)

    def save(stage: int, start: int) -> None:
        save_checkpoint({"settings": settings, "em": em.state_dict(), "stage": stage, "start": start}, state_file)

    saved = time.monotonic()
    for stage in range(first_stage, stages + 1):
        name = f"stage {stage + 1}" if stage < stages else "reconstruction"
        with (
            written_on(unfinished if stage == stages else None, positions, channels, start) as file,
            tqdm(total=positions, initial=start, desc=name, unit="position", unit_scale=True) as bar,
        ):
            while start < positions:
                began = time.perf_counter()
                x = read_tile(features, start, tile)
                if describe_file(features) != settings["features"]:
                    raise ValueError(f"{features} was changed during the run: remove {state_file} to start anew")
                if file is None:
                    em.add(x)
                else:
                    write_tile(file, start, em.attend(x).out)
                start += x.shape[2]
                yield name, x.shape[2], time.perf_counter() - began
                bar.update(x.shape[2])
                if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                    if file is not None:
                        flush(file)
                    save(stage, start)
                    saved = time.monotonic()
        if stage < stages:
            em.step()
            start = 0
    save(stages, positions)  # the state was perhaps that of another run that had finished
    with written_whole(folder / "bases.npy") as file:
        np.save(file, em.mu[0].numpy())
    os.replace(unfinished, out)
    save(stages + 1, 0)


@contextmanager
def written_on(path: Path | None, positions: int, channels: int, start: int) -> Iterator[BinaryIO | None]:
    """The .npy file (N, C) of which all positions before ``start`` are there; None for no path.

    Raises:
        ValueError: with the file's name, if it cannot be written.
    """
    if path is None:
        yield None
        return
    try:
        with open(path, "r+b" if start else "w+b") as file:
            if not start:
                write_header(file, positions, channels)
            yield file
            flush(file)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error


def peak_memory() -> float:
    """Of this process so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--positions", type=int, default=10_000_000, help="of the features that are made up")
    parser.add_argument("--channels", type=int, default=32, help="of the features that are made up")
    parser.add_argument("--bases", type=int, default=32)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--tile", type=int, default=65_536, help="positions in memory at once")
    args = parser.parse_args(argv)
    for name in ("positions", "channels", "bases", "stages", "tile"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(args, name)}")

    features = args.folder / "features.npy"
    seconds: dict[str, list[tuple[int, float]]] = {}
    try:
        with held(args.folder / ".lock", f"in {args.folder}"):
            remove_parts(features, args.folder / "bases.npy", args.folder / "state.pt")
            if not features.exists():
                make_features(features, args.positions, args.channels, args.tile)
            rows = open_features(features)
            before = peak_memory()
            for name, positions, duration in attend(args.folder, args.bases, args.stages, args.tile):
                seconds.setdefault(name, []).append((positions, duration))
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")

    print(f"features {rows.nbytes / 2**30:.2f} GiB: {rows.shape[0]:,} positions of {rows.shape[1]} channels")
    print(f"peak memory {peak_memory():.0f} MiB, of which {before:.0f} MiB before the first tile")
    if seconds:
        print("nanoseconds a position, in each fifth of a pass:")
    for name, tiles in seconds.items():
        fifths = [part.sum(0) for part in np.array_split(np.array(tiles), min(5, len(tiles)))]
        print(f"  {name:16}" + "".join(f"{1e9 * duration / positions:8.1f}" for positions, duration in fifths))


if __name__ == "__main__":
    main()
