"""The planned runs, and the file that has a row for each run that is done."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.accuracy.tasks import ABLATIONS, EVALUATED_STAGES, STAGES, TASKS
from benchmarks.blocks import TRAINED
from benchmarks.reporting import RESULTS
from examples._common.files import written_whole

FOLDER = RESULTS / "accuracy"
ROWS = FOLDER / "runs.jsonl"
SEEDS = (0, 1, 2)
Rows = Sequence[dict[str, Any]]


class Run(NamedTuple):
    task: str
    block: str
    seed: int

    def __str__(self) -> str:
        return "/".join(map(str, self))


def planned_runs() -> list[Run]:
    """All of them: seed by seed and the ablations last, so that finished runs can be compared at any time."""
    tables = [Run(task, block, seed) for task in TASKS for seed in SEEDS for block in TRAINED]
    return tables + [Run("mobilenet", block, seed) for seed in SEEDS for block in ABLATIONS]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file; none if there is no file yet. All of them have the recipes of ``TASKS``.

    Raises:
        ValueError: with the file's name and the line, for one that is no row of a run, or the second row of one.
    """
    if not path.exists():
        return []
    rows: dict[Run, dict[str, Any]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the results {path}: {error}") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            run, trained_by = Run(row["task"], row["block"], row["seed"]), row["recipe"]
            recipe = asdict(replace(TASKS[run.task].recipe, seed=run.seed))
            is_row = run.block in TASKS[run.task].blocks and _are_scores(_scores_in(row))
        except (ValueError, KeyError, TypeError, AttributeError):
            is_row = False
        if not is_row:
            raise ValueError(f"{path} must have a row of a run in each line; got {line[:80]!r} in line {number}")
        if trained_by != recipe:
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
    if row["task"] == "mobilenet" and row["block"] in STAGES.values():
        scores += [row["test_by_stages"][str(stages)] for stages in EVALUATED_STAGES]
    return scores


def _are_scores(scores: list[list[float]]) -> bool:
    classes = len(scores[0])
    return all(len(iou) == classes and all(0 <= one <= 1 or math.isnan(one) for one in iou) for iou in scores)


def add_row(row: dict[str, Any], path: Path) -> None:
    """Adds a row to a results file, which is whole at any time. Its rows are in the order of their names."""
    rows = sorted([*read_rows(path), row], key=lambda row: (row["task"], row["block"], row["seed"]))
    with written_whole(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def missing_runs(path: Path, only: str) -> list[Run]:
    done = {Run(row["task"], row["block"], row["seed"]) for row in read_rows(path)}
    return [run for run in planned_runs() if run not in done and str(run).startswith(only)]
