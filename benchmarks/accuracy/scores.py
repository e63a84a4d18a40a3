"""The scores in the rows: the runs of a block, their means, and what can be compared."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

import torch

from benchmarks.accuracy.sweep_runs import Rows


def runs_of(rows: Rows, task: str, block: str) -> Rows:
    """The rows of a block on a task, one for each seed."""
    return [row for row in rows if (row["task"], row["block"]) == (task, block)]


def count_seeds(runs: Rows) -> str:
    return "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"


def percent(iou: Sequence[float]) -> float:
    """The mean over the classes, in percent."""
    return 100 * torch.tensor(iou).nanmean().item()


def scores_of(runs: Rows) -> list[float]:
    return [percent(run["test"]) for run in runs]


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds; the value alone if there is one seed."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def like_for_like(rows: Rows, blocks: Iterable[str]) -> dict[str, Rows]:
    """MobileNetV2's runs of every block that has any, and of the seeds that all of these blocks have."""
    runs = {block: found for block in blocks if (found := runs_of(rows, "mobilenet", block))}
    seeds = set.intersection(*({run["seed"] for run in found} for found in runs.values())) if runs else set()
    return {block: [run for run in found if run["seed"] in seeds] for block, found in runs.items() if seeds}


def seeds_of(runs: dict[str, Rows]) -> list[str]:
    """A line: what an ablation was run on."""
    seeds = sorted({run["seed"] for found in runs.values() for run in found})
    return [f"CamVid, MobileNetV2, the same recipe; seeds: {', '.join(map(str, seeds))}."]
