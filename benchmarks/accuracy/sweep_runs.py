"""The planned runs, and the file that has a row for each run that is done."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.accuracy.gradients import Notes
from benchmarks.accuracy.tasks import (
    ABLATIONS,
    EVALUATED_STAGES,
    FULL_SIZE_RATES,
    LEADING,
    RUN_OF_STAGES,
    TASKS,
    TWO_RATES,
)
from benchmarks.blocks import TRAINED
from benchmarks.reporting import RESULTS
from examples._common.files import written_whole
from examples._common.recipe import Recipe

FOLDER = RESULTS / "accuracy"
ROWS = FOLDER / "runs.jsonl"
Rows = Sequence[dict[str, Any]]


class Run(NamedTuple):
    task: str
    block: str
    seed: int
    lr: float

    def __str__(self) -> str:
        return f"{self.task}/{self.block}/{self.seed}/lr {self.lr}"

    def recipe(self) -> Recipe:
        return replace(TASKS[self.task].recipe, seed=self.seed, lr=self.lr)


def run_of(row: dict[str, Any]) -> Run:
    """The run that a row is of."""
    return Run(row["task"], row["block"], row["seed"], row["recipe"]["lr"])


def planned_runs() -> list[Run]:
    """All of them: first what leads, seed by seed, so that the runs that are done can be compared at any time."""
    others = [block for block in TRAINED if block not in LEADING]
    runs = [
        *_seed_by_seed(TWO_RATES, LEADING),
        *_seed_by_seed(TWO_RATES, others),
        *_seed_by_seed(TWO_RATES, LEADING, share=0.5),
        *_seed_by_seed(("mobilenet",), ABLATIONS),
        *(Run("camvid-full", "no block", 0, lr) for lr in FULL_SIZE_RATES),
        *_seed_by_seed(("camvid-full",), TASKS["camvid-full"].blocks),
    ]
    return list(dict.fromkeys(runs))  # one of these rates is the task's own


def _seed_by_seed(tasks: Sequence[str], blocks: Iterable[str], share: float = 1) -> list[Run]:
    """The runs of the blocks at a share of each task's learning rate."""
    return [
        Run(task, block, seed, share * TASKS[task].recipe.lr)
        for seed in range(max(TASKS[task].seeds for task in tasks))
        for task in tasks
        if seed < TASKS[task].seeds
        for block in blocks
    ]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file; none if there is no file yet.

    Raises:
        ValueError: with the file's name and the line, for one that is no row of a run, of a run that is not planned
            or was trained by another recipe, or the second row of a run.
    """
    if not path.exists():
        return []
    rows: dict[Run, dict[str, Any]] = {}
    planned = set(planned_runs())
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the results {path}: {error}") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            run = run_of(row)
            is_planned = run in planned
            is_row = (
                _are_scores(_scores_in(row))
                and _are_notes(row["gradients"], run.block)
                and isinstance(row["commit"] + row["torch"], str)
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            is_row = False
        if not is_row:
            raise ValueError(f"{path} must have a row of a run in each line; got {line[:80]!r} in line {number}")
        if not is_planned:
            raise ValueError(f"{path} must have rows of planned runs, see --list; got {run} in line {number}")
        if row["recipe"] != asdict(run.recipe()):
            raise ValueError(f"{path} must have rows of the recipes in tasks.py; {run} was trained by another")
        if run in rows:
            raise ValueError(f"{path} must have one row of each run; line {number} has {run} again")
        rows[run] = row
    return list(rows.values())


def _scores_in(row: dict[str, Any]) -> list[list[float]]:
    """The IoU of every class wherever a row has it: in all that the report reads."""
    scores = [row["test"], *row["val"].values()]
    if row["task"] == "digits":
        scores.append(row["test_unmarked"])
    if row["task"] == "mobilenet" and row["block"] in RUN_OF_STAGES.values():
        scores += [row["test_by_stages"][str(stages)] for stages in EVALUATED_STAGES]
    return scores


def _are_scores(scores: list[list[float]]) -> bool:
    classes = len(scores[0])
    return all(len(iou) == classes and all(0 <= one <= 1 or math.isnan(one) for one in iou) for iou in scores)


def _are_notes(gradients: dict[str, Notes], block: str) -> bool:
    names = {"stages", "branch"} if block.startswith("EMAUnit") else {"stages"}
    numbers = [number for note in gradients.values() for values in note.values() for number in values]
    return (
        bool(numbers) and all(names <= note.keys() for note in gradients.values()) and all(map(math.isfinite, numbers))
    )


def add_row(row: dict[str, Any], path: Path) -> None:
    """Adds a row to a results file, which is whole at any time. Its rows are in the order of their names."""
    rows = sorted([*read_rows(path), row], key=run_of)
    with written_whole(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def missing_runs(path: Path, only: str) -> list[Run]:
    done = set(map(run_of, read_rows(path)))
    return [run for run in planned_runs() if run not in done and str(run).startswith(only)]
