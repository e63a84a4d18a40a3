"""Plots from the rows of the runs."""

from __future__ import annotations

import statistics

import torch
from matplotlib.figure import Figure

from benchmarks.accuracy.scores import DATA, MEASURES, count_seeds, deviation, percent, runs_of, score, scores_of
from benchmarks.accuracy.sweep_runs import Rows
from benchmarks.accuracy.tasks import COMPARED, EVALUATED_STAGES, FIXED_BASES, RUN_OF_BASES, RUN_OF_STAGES, TASKS
from benchmarks.blocks import DEFAULTS, GAMMAS, GRADIENTS, NUM_BASES, unit_name
from benchmarks.plot_style import COLOURS, MARKERS, UNIT_COLOUR


def plot_learning(rows: Rows, task: str) -> Figure:
    """Scores on the validation set over the steps: the mean over seeds, with a bar from the lowest to the highest."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    ax = figure.subplots()
    recipe = TASKS[task].recipe
    for i, block in enumerate(COMPARED):
        runs = runs_of(rows, task, block)
        if not runs:
            continue
        curves = {int(step): [score(task, run["val"][step]) for run in runs] for step in runs[0]["val"]}
        shift = recipe.evaluate_every * 0.05 * (i - len(COMPARED) // 2)  # so that no bar hides another
        means = [statistics.mean(values) for values in curves.values()]
        below, above = (
            [abs(pick(values) - mean) for values, mean in zip(curves.values(), means, strict=True)]
            for pick in (min, max)
        )
        is_unit = block.startswith("EMAUnit")
        ax.errorbar(
            [step + shift for step in curves],
            means,
            [below, above],
            color=UNIT_COLOUR if is_unit else COLOURS[i],
            linestyle="--" if block == DEFAULTS else "-",
            linewidth=2.4 if is_unit else 1.4,
            marker=MARKERS[i],
            markersize=5,
            elinewidth=1,
            capsize=2,
            label=f"{block} ({count_seeds(runs)})" if len(runs) != TASKS[task].seeds else block,
        )
    ax.set(xlabel="training steps", ylabel=f"{MEASURES[task]} on val [%],\nmean and range of the seeds")
    ax.set_title("The points of one step stand side by side.", fontsize="medium")
    ax.set(xticks=range(0, recipe.steps + 1, recipe.evaluate_every))
    ax.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def plot_starts(rows: Rows, task: str) -> Figure:
    """Scores of EMAUnit against γ, the weight that its last norm starts with: a line for each gradient.

    Mean and standard deviation over the seeds; a broken line for no block, with a band of its deviation.
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    ax = figure.subplots()
    for i, gradient in enumerate(GRADIENTS):
        scores = {gamma: scores_of(runs_of(rows, task, unit_name(gradient, gamma))) for gamma in GAMMAS}
        scores = {gamma + 0.008 * (i - 1): values for gamma, values in scores.items() if values}  # no bar hides another
        ax.errorbar(
            list(scores),
            list(map(statistics.mean, scores.values())),
            list(map(deviation, scores.values())),
            color=(COLOURS[4], COLOURS[2], UNIT_COLOUR)[i],
            linestyle=("--", "-.", "-")[i],
            marker=MARKERS[i],
            capsize=3,
            label=f'gradient="{gradient}"',
        )
    if nothing := scores_of(runs_of(rows, task, "no block")):
        mean, around = statistics.mean(nothing), deviation(nothing)
        ax.axhline(mean, color="#000000", linestyle=":", label="no block")
        ax.axhspan(mean - around, mean + around, color="#000000", alpha=0.1, linewidth=0, label="its deviation")
    ax.set(xticks=GAMMAS, xticklabels=GAMMAS, xlabel="γ at the start (layer_scale)")
    ax.set_ylabel(f"{MEASURES[task]} on test [%]")
    ax.set_title(f"{DATA[task]}: mean and standard deviation over the seeds", fontsize="medium")
    ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def plot_bases(runs: dict[str, Rows]) -> Figure:
    """Scores against the number of bases K, and without the moving average; a line through the means."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    scores = {k: scores_of(runs[block]) for k, block in RUN_OF_BASES.items() if block in runs}
    seeds = [(k, value) for k, values in scores.items() for value in values]
    ax.plot(*zip(*seeds, strict=True), "o", color=UNIT_COLOUR, alpha=0.5, label="a seed")
    means = [statistics.mean(values) for values in scores.values()]
    ax.plot(list(scores), means, color=UNIT_COLOUR, label="mean of the seeds")
    if fixed := runs.get(FIXED_BASES):
        beside = [NUM_BASES * 1.03 ** (i + 1) for i in range(len(fixed))]  # so that no cross hides another
        ax.plot(beside, scores_of(fixed), "x", color=COLOURS[1], label=f"fixed bases, K = {NUM_BASES}: a seed")
    if nothing := runs.get("no block"):
        ax.axhline(
            statistics.mean(scores_of(nothing)), color="#000000", linestyle="--", linewidth=1, label="no block, mean"
        )
    ax.set(
        xscale="log",
        xticks=list(RUN_OF_BASES),
        xticklabels=list(RUN_OF_BASES),
        xlabel="bases K",
        ylabel="mIoU on test [%]",
    )
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def plot_stages(runs: dict[str, Rows]) -> Figure:
    """MIoU for each number of EM stages in training and in evaluation, the mean over the seeds."""
    trained = [stages for stages, block in RUN_OF_STAGES.items() if block in runs]
    grid = torch.tensor(
        [
            [
                statistics.mean(percent(run["test_by_stages"][str(t)]) for run in runs[RUN_OF_STAGES[stages]])
                for t in EVALUATED_STAGES
            ]
            for stages in trained
        ]
    )
    figure = Figure(figsize=(7.5, 1.6 + 0.6 * len(trained)), layout="constrained")
    ax = figure.subplots()
    heat = ax.imshow(grid.numpy(), cmap="cividis", aspect="auto")
    middle = (grid.min() + grid.max()) / 2
    for row, column in torch.cartesian_prod(*map(torch.arange, grid.shape)).tolist():
        value = grid[row, column]
        ax.text(column, row, f"{value:.1f}", ha="center", va="center", color="white" if value < middle else "black")
    ax.set(xticks=range(len(EVALUATED_STAGES)), xticklabels=EVALUATED_STAGES, xlabel="EM stages in evaluation")
    ax.set(yticks=range(len(trained)), yticklabels=trained, ylabel="EM stages in training")
    figure.colorbar(heat, label="mIoU on test [%]")
    return figure
