"""Made-up rows of runs, and made-up costs of their networks."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from benchmarks.accuracy.sweep_runs import Run, planned_runs
from benchmarks.accuracy.tasks import ABLATIONS, EVALUATED_STAGES, TASKS


def row(task: str, block: str, seed: int, score: float, share: float = 1) -> dict[str, Any]:
    """The row of a run at a share of the task's learning rate."""
    recipe = asdict(Run(task, block, seed, share * TASKS[task].recipe.lr).recipe())
    classes = 2 if task == "digits" else 11
    test = [score] * classes if task == "digits" else [score, float("nan"), *[score] * (classes - 2)]
    made = {"task": task, "block": block, "seed": seed, "test": test, "val": {"10": [*test], "20": [*test]}}
    if task == "mobilenet":
        made["test_by_stages"] = {str(t): [score + t / 100] * classes for t in EVALUATED_STAGES}
    notes: dict[str, list[float]] = {"stages": [score, 2 * score]}
    if block.startswith("EMAUnit") or block in ABLATIONS:
        notes |= {"branch": [score / 2]}
    made["gradients"] = {str(step): dict(notes) for step in (1, 2, 4, 8, 16)}
    code = {"torch": "2.15", "commit": "0123456789"}
    return {**made, "test_unmarked": [score / 2] * classes, "recipe": recipe, **code}


ABLATED = {block: 0.3 + i / 100 for i, block in enumerate(ABLATIONS)}
"""The score of each ablation."""
ROWS = [
    row(task, block, seed, ABLATED.get(block, 0.5 + seed / 10), lr / TASKS[task].recipe.lr)
    for task, block, seed, lr in planned_runs()
]
TIMES = {
    "forward": {"median": 0.01, "quartiles": [0.009, 0.012]},
    "training step": {"median": 0.2, "quartiles": [0.1, 0.3]},
}
COST = {"parameters": 1_500_000, "macs": 2_000_000_000, **TIMES}
COSTS = {
    "environment": {"machine": "a machine", "device": "cpu", "threads": 2, "torch": "2.15", "commit": "9876543210"},
    "networks": {name: {"blocks": dict.fromkeys(task.compared(), COST)} for name, task in TASKS.items()},
}
