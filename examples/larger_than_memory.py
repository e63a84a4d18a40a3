"""EM attention of one sample that lies on disk, in the memory of one tile, and resumable after being killed.

    python -m examples.larger_than_memory out --positions 100_000_000

The features are FOLDER/features.npy, (N, C) float32, one row a position. If the file is not there, it is made up.
The reconstruction goes to FOLDER/out.npy, of the same shape, and the bases to FOLDER/bases.npy, (C, K). The state is
saved every few seconds: after a run was killed, the same command goes on from the last state.
"""

import argparse
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.format import header_data_from_array_1_0, open_memmap, write_array_header_1_0
from tqdm import tqdm

from ema_attention import TiledEMAttention
from examples._common.files import written_whole

SECONDS_BETWEEN_SAVES = 5.0
MATERIALS = 12  # what the made-up features are made of


def make_features(path: Path, positions: int, channels: int, tile: int) -> None:
    """Rows of a few directions with noise, written as a .npy file tile after tile."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((MATERIALS, channels), np.float32)
    with written_whole(path) as file:
        header = {**header_data_from_array_1_0(directions), "shape": (positions, channels)}
        write_array_header_1_0(file, header)
        for start in tqdm(range(0, positions, tile), desc="making features", unit="tile"):
            rows = directions[rng.integers(MATERIALS, size=min(tile, positions - start))]
            rows += 0.5 * rng.standard_normal(rows.shape, np.float32)
            file.write(rows)


def read_tile(path: Path, start: int, size: int) -> torch.Tensor:
    """Positions ``start`` to ``start + size`` as (1, C, size), copied: pages that stay mapped count as memory."""
    rows = np.array(open_memmap(path, "r")[start : start + size])
    return torch.from_numpy(rows).T[None]


def write_tile(path: Path, start: int, tile: torch.Tensor) -> None:
    rows = tile[0].T.numpy()
    open_memmap(path, "r+")[start : start + len(rows)] = rows


def save(state: dict[str, object], path: Path) -> None:
    with written_whole(path) as file:
        torch.save(state, file)


def attend(folder: Path, bases: int, stages: int, tile: int) -> Iterator[tuple[str, int, float]]:
    """Computes out.npy and bases.npy; yields, for each tile, the name of the pass, its positions and its seconds."""
    features, out, state_file = folder / "features.npy", folder / "out.npy", folder / "state.pt"
    positions, channels = open_memmap(features, "r").shape
    settings = {"positions": positions, "bases": bases, "stages": stages, "tile": tile}
    generator = torch.Generator().manual_seed(0)
    em = TiledEMAttention(F.normalize(torch.randn(channels, bases, generator=generator), dim=0))
    first_stage, start = 0, 0
    if state_file.exists():
        try:
            state = torch.load(state_file, weights_only=True)
        except Exception as error:  # torch.load has many ways to say that a file is not one of its own
            raise ValueError(
                f"{state_file} must hold the state of a run; got a file that torch.load cannot read"
            ) from error
        if state["settings"] != settings:
            raise ValueError(f"{state_file} must be of a run with {settings}; got {state['settings']}")
        em.load_state_dict(state["em"])
        first_stage, start = state["stage"], state["start"]
        print(f"going on in pass {first_stage + 1} of {stages + 1}, at position {start:,}", flush=True)
    else:
        open_memmap(out, "w+", np.float32, (positions, channels))
    saved = time.monotonic()
    for stage in range(first_stage, stages + 1):
        name = f"stage {stage + 1}" if stage < stages else "reconstruction"
        with tqdm(total=positions, initial=start, desc=name, unit="position", unit_scale=True) as bar:
            while start < positions:
                began = time.perf_counter()
                x = read_tile(features, start, tile)
                if stage < stages:
                    em.add(x)
                else:
                    write_tile(out, start, em.attend(x).out)
                start += x.shape[2]
                yield name, x.shape[2], time.perf_counter() - began
                bar.update(x.shape[2])
                if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                    save({"settings": settings, "em": em.state_dict(), "stage": stage, "start": start}, state_file)
                    saved = time.monotonic()
        if stage < stages:
            em.step()
            start = 0
    with written_whole(folder / "bases.npy") as file:
        np.save(file, em.mu[0].numpy())
    state_file.unlink(missing_ok=True)


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

    args.folder.mkdir(parents=True, exist_ok=True)
    features = args.folder / "features.npy"
    seconds: dict[str, list[tuple[int, float]]] = {}
    try:
        if not features.exists():
            make_features(features, args.positions, args.channels, args.tile)
        rows = open_memmap(features, "r")
        if rows.ndim != 2 or rows.dtype != np.float32:
            raise ValueError(f"{features} must hold (N, C) float32; got {rows.shape} {rows.dtype}")
        before = peak_memory()
        for name, positions, duration in attend(args.folder, args.bases, args.stages, args.tile):
            seconds.setdefault(name, []).append((positions, duration))
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")

    print(f"features {rows.nbytes / 2**30:.2f} GiB: {rows.shape[0]:,} positions of {rows.shape[1]} channels")
    print(f"peak memory {peak_memory():.0f} MiB, of which {before:.0f} MiB before the first tile")
    print("nanoseconds a position, in each fifth of a pass:")
    for name, tiles in seconds.items():
        fifths = [part.sum(0) for part in np.array_split(np.array(tiles), min(5, len(tiles)))]
        print(f"  {name:16}" + "".join(f"{1e9 * duration / positions:8.1f}" for positions, duration in fifths))


if __name__ == "__main__":
    main()
