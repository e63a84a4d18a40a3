"""Markdown from the rows of the runs: the tables of the report and of the README."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.accuracy.scores import count_seeds, percent, runs_of, spread
from benchmarks.accuracy.sweep_runs import Rows
from benchmarks.accuracy.tasks import PAPER_SETTINGS
from benchmarks.blocks import TRAINED
from benchmarks.reporting import markdown_table, milliseconds
from examples.emanet.data import CAMVID_NAMES

TITLES = {
    "digits": "Digits that equal the key: what has to be known is far away",
    "mobilenet": "CamVid, MobileNetV2 with ImageNet's weights",
    "resnet18": "CamVid, ResNet-18 from scratch",
}


def task_table(rows: Rows, networks: dict[str, Any], task: str) -> list[str]:
    """What each block adds: IoU on the test set over seeds, and what the network costs."""
    costs = networks["networks"][task]
    head = ["block", "mIoU", "seeds", "parameters", "GMAC", "forward, ms", "training step, ms"]
    if task == "digits":
        head[1:1] = ["IoU of the wanted digits", "the same, key unmarked"]
    cells = []
    for block in TRAINED:
        runs, cost = runs_of(rows, task, block), costs["blocks"][block]
        scores = [spread([percent(run["test"]) for run in runs])]
        if task == "digits":
            wanted = [spread([100 * run[of][1] for run in runs]) for of in ("test", "test_unmarked")]
            scores = [*wanted, *scores]
        times = [milliseconds(cost[kind]) for kind in ("forward", "training step")]
        cost_cells = [f"{cost['parameters'] / 1e6:.3f} M", f"{cost['macs'] / 1e9:.3f}", *times]
        cells.append([block, *scores, str(len(runs)), *cost_cells])
    return markdown_table(head, cells)


def class_table(rows: Rows, task: str) -> list[str]:
    """The mean IoU of every class over the seeds."""
    cells = []
    for block in TRAINED:
        runs = runs_of(rows, task, block)
        if runs:
            means = 100 * torch.tensor([run["test"] for run in runs]).nanmean(0)
            cells.append([block, *(f"{value:.1f}" for value in means.tolist())])
    return markdown_table(["block", *CAMVID_NAMES], cells)


def readme_table(rows: Rows) -> str:
    """The score of every block on each task, and the commands that make it."""
    heads = {
        "digits": "digit scenes, IoU of the wanted digits",
        "mobilenet": "CamVid, MobileNetV2, mIoU",
        "resnet18": "CamVid, ResNet-18, mIoU",
    }
    columns = {}
    for task in TITLES:
        runs = {block: runs_of(rows, task, block) for block in TRAINED}
        if any(runs.values()):
            fewest, most = (pick(map(len, runs.values())) for pick in (min, max))
            seeds = count_seeds(runs_of(rows, task, PAPER_SETTINGS)) if fewest == most else f"{fewest} to {most} seeds"
            score = (lambda run: 100 * run["test"][1]) if task == "digits" else (lambda run: percent(run["test"]))
            columns[f"{heads[task]}, {seeds}"] = [spread([score(run) for run in runs[block]]) for block in TRAINED]
    cells = [[block, *scores] for block, *scores in zip(TRAINED, *columns.values(), strict=True)]
    caption = (
        "`python -m benchmarks.accuracy.sweep --root CAMVID`, `python -m benchmarks.accuracy`; percent on the test "
        "set, mean ± standard deviation over seeds. The word behind EMAUnit is its `gradient`; `none` is the paper's."
    )
    return "\n".join([caption, "", *markdown_table(["block", *columns], cells), ""])
