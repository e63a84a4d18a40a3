"""Plots of what the start γ does to the gradient that reaches the backbone, and to what is learned."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.accuracy.gradients import EARLY, early
from benchmarks.accuracy.scores import like_for_like
from benchmarks.accuracy.sweep_runs import Rows
from benchmarks.blocks import DEFAULTS, GAMMAS, unit_name
from examples.emanet.data import CAMVID_NAMES

SMALL = ("sign", "pedestrian", "cyclist")
"""Classes of few pixels a frame."""
STYLES: dict[str, dict[str, Any]] = {
    "no block": {"color": "#8C8C8C", "linestyle": ":", "marker": "s"},
    DEFAULTS: {"color": "#000000", "linestyle": "--", "marker": "D"},
    **{
        unit_name("all", gamma): {"color": matplotlib.colormaps["viridis"](i / len(GAMMAS)), "marker": "o^vP>"[i]}
        for i, gamma in enumerate(GAMMAS)
    },
}
"""How each block is drawn. γ goes from dark to light, which every eye tells apart."""


def plot_gradients(rows: Rows, task: str) -> Figure:
    """Three plots, means over the seeds that all blocks have, of the gradient in the backbone and in front of the unit.

    By step: the norm of the gradient that reaches x through the attention, divided by that of the one through the sum;
    and the norm of the backbone's gradient, from the mean norms of its stages. By stage: that norm in the first steps.
    A point is the mean from its step to the next point.
    """
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    ratio, norm, by_stage = figure.subplots(1, 3)
    runs = like_for_like(rows, task, STYLES)
    for block, found in runs.items():
        notes = [run["gradients"] for run in found]
        style = STYLES[block]
        steps = list(notes[0])
        line = {"label": block, "markersize": 4, "linewidth": 1.5, **style}
        if "branch" in notes[0][steps[0]]:
            values = [statistics.mean(note[step]["branch"][0] for note in notes) for step in steps]
            ratio.plot(*_positive(list(map(int, steps)), values), **line)
        totals = [statistics.mean(math.hypot(*note[step]["stages"]) for note in notes) for step in steps]
        norm.plot(list(map(int, steps)), totals, **line)
        stages = [early(note, "stages") for note in notes]
        by_stage.plot(range(1, len(stages[0]) + 1), list(map(statistics.mean, zip(*stages, strict=True))), **line)
    ratio.axhline(1, color="#8C8C8C", linewidth=1)
    ratio.set(xscale="log", yscale="log", xlabel="training step")
    ratio.set_ylabel("norm of the gradient of x through the attention,\nover that of its gradient through the sum")
    norm.set(xscale="log", yscale="log", xlabel="training step", ylabel="norm of the backbone's gradient")
    by_stage.set(yscale="log", xlabel="stage of the backbone, from the image on")
    by_stage.set_ylabel(f"norm of the stage's gradient,\nmean of steps 1 to {EARLY - 1}")
    by_stage.xaxis.get_major_locator().set_params(integer=True)
    for axis in (ratio.xaxis, norm.xaxis, *(ax.yaxis for ax in figure.axes)):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if axis.axis_name == "y" else (1,)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    _finish(figure, runs, norm)
    return figure


def _positive(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """What a logarithmic axis can show."""
    shown = [(step, value) for step, value in zip(steps, values, strict=True) if value > 0]
    return [step for step, _ in shown], [value for _, value in shown]


def plot_small_classes(rows: Rows, task: str) -> Figure:
    """IoU of small classes on the validation set by step, the mean over the seeds that all blocks have."""
    runs = like_for_like(rows, task, STYLES)
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    for ax, name in zip(figure.subplots(1, len(SMALL), sharex=True), SMALL, strict=True):
        index = CAMVID_NAMES.index(name)
        for block, found in runs.items():
            curve = {int(step): [100 * run["val"][step][index] for run in found] for step in found[0]["val"]}
            ax.plot(list(curve), list(map(statistics.mean, curve.values())), label=block, **STYLES[block])
        ax.set(title=name, xlabel="training step", ylabel="IoU on val [%]")
    _finish(figure, runs, ax)
    return figure


def _finish(figure: Figure, runs: dict[str, Rows], labelled: Axes) -> None:
    """Says of which seeds the lines are, and of which blocks."""
    seeds = sorted({run["seed"] for found in runs.values() for run in found})
    figure.suptitle(f"seeds: {', '.join(map(str, seeds))}", fontsize="medium")
    for ax in figure.axes:
        ax.grid(alpha=0.3)
    figure.legend(*labelled.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
