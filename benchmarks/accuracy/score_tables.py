"""Markdown from the rows of the runs: the tables of the report and of the README."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

import torch

from benchmarks.accuracy.gradients import early
from benchmarks.accuracy.scores import DATA, MEASURES, count_seeds, percent, runs_of, scores_of, spread
from benchmarks.accuracy.sweep_runs import Rows, run_of
from benchmarks.accuracy.tasks import COMPARED, FULL_SIZE_RATES, LEADING, RECOMMENDED, TASKS, TWO_RATES
from benchmarks.blocks import GAMMAS, GRADIENTS, NUM_BASES, NUM_STAGES, unit_name
from benchmarks.reporting import markdown_table, milliseconds
from examples.emanet.data import CAMVID_NAMES

TITLES = {
    "digits": "Digits that equal the key: what has to be known is far away",
    "mobilenet": "CamVid, MobileNetV2 with ImageNet's weights",
    "camvid-full": "CamVid at 480×360, the whole MobileNetV2",
}
SCORES = {task: f"{data}, {MEASURES[task]}" for task, data in DATA.items()}
"""What the columns of scores are called."""

NAMES = (
    "The word behind EMAUnit is its `gradient`, and γ is its `layer_scale`: the weight that its last norm starts with. "
    "*Defaults* are the published `none` and 1. Non-local's last norm and DANet's gains start at 0, as in their "
    "papers. *Gain from 1* is DANet with gains that start at 1."
)
"""What the names of the blocks mean."""


def score_table(rows: Rows, blocks: Iterable[str]) -> list[str]:
    """The score of every block on each task that has runs: mean ± standard deviation over seeds."""
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    head = [f"{SCORES[task]}, {TASKS[task].seeds} seeds" for task in tasks]
    cells = [[block, *(_score(task, runs_of(rows, task, block)) for task in tasks)] for block in blocks]
    return markdown_table(["block", *head], cells)


def _score(task: str, runs: Rows, test: str = "test") -> str:
    """With the number of seeds where it is not the planned one."""
    is_partial = runs and len(runs) != TASKS[task].seeds
    return spread(scores_of(runs, test)) + (f" ({count_seeds(runs)})" if is_partial else "")


def task_table(rows: Rows, networks: dict[str, Any], task: str) -> list[str]:
    """What each block adds: IoU on the test set over seeds, and what the network costs."""
    costs = networks["networks"][task]["blocks"]
    head = ["block", "mIoU", "seeds", "parameters", "GMAC", "forward, ms", "training step, ms"]
    if task == "digits":
        head[1:1] = ["IoU of the wanted digits", "the same, key unmarked"]
    cells = []
    for block, cost in costs.items():
        runs = runs_of(rows, task, block)
        scores = [spread([percent(run["test"]) for run in runs])]
        if task == "digits":
            scores = [*(spread(scores_of(runs, test)) for test in ("test", "test_unmarked")), *scores]
        times = [milliseconds(cost[kind]) for kind in ("forward", "training step")]
        cost_cells = [f"{cost['parameters'] / 1e6:.3f} M", f"{cost['macs'] / 1e9:.3f}", *times]
        cells.append([block, *scores, str(len(runs)), *cost_cells])
    return markdown_table(head, cells)


def start_table(rows: Rows, task: str, test: str = "test") -> list[str]:
    """The score of EMAUnit for each gradient, a row, and each γ that its last norm starts with, a column.

    Args:
        rows: of the runs.
        task: its name.
        test: the set that was scored, ``"test"`` or ``"test_unmarked"``.
    """
    cells = [
        [f"`{gradient}`", *(_score(task, runs_of(rows, task, unit_name(gradient, gamma)), test) for gamma in GAMMAS)]
        for gradient in GRADIENTS
    ]
    return markdown_table(["gradient", *(f"γ {gamma:g}" for gamma in GAMMAS)], cells)


def branch_table(rows: Rows, task: str) -> list[str]:
    """For each gradient that passes through EM, and each γ: what reaches x through the attention in the first steps.

    It is the norm of that gradient, divided by the norm of the gradient through the sum with x: the mean over the steps
    and the seeds.
    """
    cells = []
    for gradient in GRADIENTS[1:]:
        runs = [runs_of(rows, task, unit_name(gradient, gamma)) for gamma in GAMMAS]
        ratios = [[early(run["gradients"], "branch")[0] for run in found] for found in runs]
        cells.append([f"`{gradient}`", *(f"{statistics.mean(ratio):.2f}" if ratio else "–" for ratio in ratios)])
    return markdown_table(["gradient", *(f"γ {gamma:g}" for gamma in GAMMAS)], cells)


def half_rate_table(rows: Rows) -> list[str]:
    """The scores of the leading blocks at the learning rate of each task, and at half of it."""
    columns = [(task, share) for task in TWO_RATES for share in (1, 0.5)]
    head = [f"{SCORES[task]}, lr {share * TASKS[task].recipe.lr:g}" for task, share in columns]
    cells = [
        [block, *(_score(task, runs_of(rows, task, block, share)) for task, share in columns)] for block in LEADING
    ]
    return markdown_table(["block", *head], cells)


def full_size_rate_table(rows: Rows) -> list[str]:
    """What the learning rate of ``camvid-full`` was chosen from: the best mIoU on val, no block, seed 0."""
    found = {run_of(row).lr: row for row in rows if run_of(row)[:3] == ("camvid-full", "no block", 0)}
    cells = [
        [f"{lr:g}", f"{max(map(percent, found[lr]['val'].values())):.1f}" if lr in found else "–"]
        for lr in FULL_SIZE_RATES
    ]
    return markdown_table(["learning rate", "best mIoU on val"], cells)


def ablation_table(runs: dict[str, Rows], label: str) -> list[str]:
    """The mIoU of what was varied: mean ± standard deviation over seeds; and what the runs have in common.

    Args:
        runs: of each block.
        label: what ``RECOMMENDED`` is called among the others.
    """
    seeds = sorted({run["seed"] for found in runs.values() for run in found})
    names = {RECOMMENDED: label}
    cells = [[names.get(block, block), spread(scores_of(found))] for block, found in runs.items()]
    return [
        f"{label} is {RECOMMENDED}, with K = {NUM_BASES} and T = {NUM_STAGES}. The others change one thing"
        f"{', or have no block' if 'no block' in runs else ''}. {DATA['mobilenet']},",
        f"the same recipe; seeds: {', '.join(map(str, seeds))}.",
        "",
        *markdown_table(["", "mIoU"], cells),
    ]


def class_table(rows: Rows, task: str) -> list[str]:
    """The mean IoU of every class over the seeds, and how many these are."""
    cells = []
    for block in TASKS[task].blocks:
        runs = runs_of(rows, task, block)
        if runs:
            means = 100 * torch.tensor([run["test"] for run in runs]).nanmean(0)
            cells.append([block, str(len(runs)), *(f"{value:.1f}" for value in means.tolist())])
    return markdown_table(["block", "seeds", *CAMVID_NAMES], cells)


def readme_table(rows: Rows) -> str:
    """The score of the blocks that are compared and have runs, and the commands that make it."""
    caption = (
        "`python -m benchmarks.accuracy.sweep --root CAMVID`, `python -m benchmarks.accuracy`; IoU, the overlap with "
        "the labels, in percent on the test set: mean ± standard deviation over seeds; – is not trained. γ, in code "
        "`layer_scale`, is how much a block counts beside its input when the training starts: at 1 fully, at 0 not at "
        'all. *all* is `gradient="all"`, which passes the gradient through EM. *Defaults* are the published '
        '`gradient="none"` and γ = 1. Non-local and DANet start at 0, as in their papers, and *gain from 1* at 1.'
    )
    trained = [block for block in COMPARED if any(runs_of(rows, task, block) for task in TASKS)]
    return "\n".join([caption, "", *score_table(rows, trained), ""])
