"""Made-up rows of runs, and made-up costs of their networks."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from benchmarks.accuracy.tasks import ABLATIONS, EVALUATED_STAGES, TASKS
from benchmarks.blocks import TRAINED


def row(task: str, block: str, seed: int, score: float) -> dict[str, Any]:
    classes = 2 if task == "digits" else 11
    test = [score] * classes if task == "digits" else [score, float("nan"), *[score] * (classes - 2)]
    made = {"task": task, "block": block, "seed": seed, "test": test, "val": {"10": test, "20": test}}
    if task == "mobilenet":
        made["test_by_stages"] = {str(t): [score + t / 100] * classes for t in EVALUATED_STAGES}
    recipe = asdict(replace(TASKS[task].recipe, seed=seed))
    return {**made, "test_unmarked": [score / 2] * classes, "recipe": recipe}


ROWS = [row(task, block, seed, 0.5 + seed / 10) for task in TASKS for block in TRAINED for seed in (0, 1, 2)]
ROWS += [row("mobilenet", block, 0, 0.4) for block in ABLATIONS]
TIMES = {
    "forward": {"median": 0.01, "quartiles": [0.009, 0.012]},
    "training step": {"median": 0.2, "quartiles": [0.1, 0.3]},
}
COST = {"parameters": 1_500_000, "macs": 2_000_000_000, **TIMES}
COSTS = {
    "environment": {"machine": "a machine", "device": "cpu", "threads": 2, "torch": "2.15"},
    "networks": {task: {"blocks": dict.fromkeys(TRAINED, COST)} for task in TASKS},
}
