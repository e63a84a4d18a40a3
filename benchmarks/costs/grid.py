"""The time of EMAUnit compared with the published unit's, cell by cell: size, batch, channels, precision and mode."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import benchmarks
from benchmarks.costs import sizes
from benchmarks.costs.unit_pairs import Pair, Precision, prepare_pair, units, wrong_units
from benchmarks.environment import environment
from benchmarks.measure import Mode, interleaved, summary
from ema_attention import GradientMode

CELL_MODES: dict[str, tuple[Mode, GradientMode]] = {
    "eval forward": ("forward", "none"),
    'training step, gradient="none"': ("training step", "none"),
    'training step, gradient="all"': ("training step", "all"),
}
SMALL = 32
"""H = W up to which a cell is small."""


class Cell(NamedTuple):
    """One comparison: tokens are (batch, side², channels), images (batch, channels, side, side)."""

    side: int
    batch: int
    channels: int
    tokens: bool
    precision: Precision
    mode: str
    """A key of ``CELL_MODES``."""
    compiled: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        if self.tokens:
            return self.batch, self.side**2, self.channels
        return self.batch, self.channels, self.side, self.side

    @property
    def input_bytes(self) -> int:
        """Of x in float32."""
        return 4 * self.batch * self.channels * self.side**2


def cells(grid: sizes.Grid, device: str) -> list[Cell]:
    """Those that are measured on ``device``, small ones first. On a GPU some are measured compiled, too."""
    on_gpu = torch.device(device).type == "cuda"
    largest = grid.largest_input_on_gpu if on_gpu else grid.largest_input
    inputs = [*((c, False) for c in grid.channels), *((c, True) for c in grid.token_channels)]
    eager = [
        Cell(side, batch, channels, tokens, precision, mode)
        for side in grid.sides
        for batch in grid.batches
        for channels, tokens in inputs
        for precision in grid.precisions
        for mode in CELL_MODES
    ]
    eager = [cell for cell in eager if cell.input_bytes <= largest]
    compiled = [
        cell._replace(compiled=True)
        for cell in eager
        if on_gpu and cell.side in grid.compiled_sides and cell.channels in grid.compiled_channels and not cell.tokens
    ]
    return eager + compiled


def measure_grid(grid: sizes.Grid, device: str, progress: tqdm, command: str) -> dict[str, Any]:
    """``{"environment", "command", "largest_input", "cells"}``, a step of ``progress`` for each cell.

    A cell is its fields, and as ``unit`` and ``published`` a :func:`benchmarks.measure.summary` of seconds. If a unit
    is wrong, the result is ``{"withheld": reason}``.
    """
    progress.set_description_str("cell by cell")
    if reason := wrong_units(device):
        return {"withheld": reason}
    on_gpu = torch.device(device).type == "cuda"
    rows = []
    with tf32_as_pytorch_sets_it():
        convolutions_in_tf32 = on_gpu and torch.backends.cudnn.allow_tf32
        for cell in cells(grid, device):
            progress.set_postfix_str(name(cell))
            rows.append({**cell._asdict(), **_measure(cell, grid, device)})
            progress.update()
    return {
        "environment": environment(device),
        "command": command,
        "largest_input": grid.largest_input_on_gpu if on_gpu else grid.largest_input,
        "convolutions_in_tf32": convolutions_in_tf32,
        "cells": rows,
    }


def _measure(cell: Cell, grid: sizes.Grid, device: str) -> dict[str, dict]:
    mode, gradient = CELL_MODES[cell.mode]
    pair = units(cell.channels, gradient, cell.tokens)
    if cell.compiled:
        torch.compiler.reset()  # else the shapes of the cells before make this one dynamic
        pair = Pair(*(torch.compile(module, dynamic=False) for module in pair))
    calls = prepare_pair(pair, cell.shape, mode, cell.precision, device)
    samples = interleaved(calls, seconds=grid.seconds, least=grid.least, device=device)
    if torch.device(device).type == "cuda":
        del calls, pair
        torch.cuda.empty_cache()
    return {key: summary(values) for key, values in samples.items()}


@contextmanager
def tf32_as_pytorch_sets_it() -> Iterator[None]:
    """Inside, a GPU's convolutions use TF32 where PyTorch by default lets them. Other benchmarks turn it off."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = benchmarks.TF32_OF_PYTORCH
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def ratio(row: dict[str, Any]) -> float:
    """EMAUnit's median time / the published unit's."""
    return row["unit"]["median"] / row["published"]["median"]


def worst(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row with the largest ratio."""
    return max(rows, key=ratio)


def best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row with the smallest ratio."""
    return min(rows, key=ratio)


def geometric_mean(rows: list[dict[str, Any]]) -> float:
    """Of the ratios."""
    return statistics.geometric_mean(map(ratio, rows))


def above_one(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows where EMAUnit takes longer, the largest ratio first."""
    return sorted((row for row in rows if ratio(row) > 1), key=ratio, reverse=True)


def small_float32(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in float32 up to 32×32."""
    return [row for row in rows if row["precision"] == "float32" and row["side"] <= SMALL]


def variants(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows that are not compiled as "eager", and if there are any, those that are as "compiled"."""
    groups = {"eager": [r for r in rows if not r["compiled"]], "compiled": [r for r in rows if r["compiled"]]}
    return {variant: group for variant, group in groups.items() if group}


def input_name(row: dict[str, Any]) -> str:
    return f"tokens, C = {row['channels']}" if row["tokens"] else f"C = {row['channels']}"


def name(cell: Cell | dict[str, Any]) -> str:
    """Names a cell or a row in words."""
    row = cell._asdict() if isinstance(cell, Cell) else cell
    compiled = ", compiled" if row["compiled"] else ""
    side = row["side"]
    return f"{row['mode']}, {row['precision']}, {input_name(row)}, {side}×{side}, batch {row['batch']}{compiled}"
