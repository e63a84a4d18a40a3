"""The planned runs, and the file that has a row for each run that is done."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.accuracy.tasks import ABLATIONS, TASKS
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
    """The rows of a results file; none if there is no file yet. All of them have the recipes of ``TASKS``."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
            run = Run(row["task"], row["block"], row["seed"])
            recipe = asdict(replace(TASKS[run.task].recipe, seed=run.seed))
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{path} must have a row of a run in each line; got {line[:80]!r}") from None
        if row["recipe"] != recipe:
            raise ValueError(f"{path} must have rows of the recipes in tasks.py; {run} was trained by another")
        rows.append(row)
    return rows


def add_row(row: dict[str, Any], path: Path) -> None:
    """Adds a row to a results file, which is whole at any time. Its rows are in the order of their names."""
    rows = sorted([*read_rows(path), row], key=lambda row: (row["task"], row["block"], row["seed"]))
    with written_whole(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def missing_runs(path: Path, only: str) -> list[Run]:
    done = {Run(row["task"], row["block"], row["seed"]) for row in read_rows(path)}
    return [run for run in planned_runs() if run not in done and str(run).startswith(only)]
