"""The scores in the rows: the runs of a block, their means, and what can be compared."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from benchmarks.accuracy.sweep_runs import Rows
from benchmarks.accuracy.tasks import TASKS
from examples._common.evaluation import mean_iou
from examples.digit_scenes import DigitScenes

DATA = {"digits": "digit scenes", "mobilenet": "CamVid, 240×180", "camvid-full": "CamVid, 480×360"}
MEASURES = {task: "IoU of the wanted digits" if task == "digits" else "mIoU" for task in TASKS}
"""What a block is judged by in each task."""


def runs_of(rows: Rows, task: str, block: str, share: float = 1) -> Rows:
    """The rows of a block on a task, one for each seed, at a share of the task's learning rate."""
    lr = share * TASKS[task].recipe.lr
    return [row for row in rows if (row["task"], row["block"], row["recipe"]["lr"]) == (task, block, lr)]


def count_seeds(runs: Rows) -> str:
    return "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"


def percent(iou: Sequence[float]) -> float:
    """The mean over the classes, in percent."""
    return 100 * mean_iou(iou)


def score(task: str, iou: Sequence[float]) -> float:
    """The task's measure in percent, from the IoU of each class."""
    return 100 * iou[DigitScenes.wanted] if task == "digits" else percent(iou)


def scores_of(runs: Rows, test: str = "test") -> list[float]:
    """The scores of runs on a set that was tested: ``"test"``; the digits have ``"test_unmarked"`` too."""
    return [score(run["task"], run[test]) for run in runs]


def origin(rows: Rows) -> str:
    """The commit and the PyTorch that the rows are of; and a warning, if they are of several."""
    counts = Counter((row["commit"], row["torch"]) for row in rows)
    listed = "; ".join(f"{count} of commit {commit} with PyTorch {torch}" for (commit, torch), count in counts.items())
    warning = " **They are not of one commit and one PyTorch, so what they differ by may come from the code.**"
    return f"Rows: {listed}.{warning if len(counts) > 1 else ''}"


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds; the value alone if there is one seed."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {deviation(values):.1f}"


def deviation(values: Sequence[float]) -> float:
    """The standard deviation over seeds; 0 for one seed."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def like_for_like(rows: Rows, task: str, blocks: Iterable[str]) -> dict[str, Rows]:
    """The runs of every block that has any on a task, and of the seeds that all of these blocks have."""
    runs = {block: found for block in blocks if (found := runs_of(rows, task, block))}
    seeds = set.intersection(*({run["seed"] for run in found} for found in runs.values())) if runs else set()
    return {block: [run for run in found if run["seed"] in seeds] for block, found in runs.items() if seeds}
