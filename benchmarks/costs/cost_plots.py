"""The plots of the cost report."""

from __future__ import annotations

import math

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.blocks import BLOCKS
from benchmarks.costs import grid
from benchmarks.measure import MODES
from benchmarks.plot_style import COLOURS, MARKERS, UNIT_COLOUR

UNIT = "EMAUnit"
FARTHEST = 2.0
"""A ratio of the grid, and its inverse, from which on the colour stays the same."""


def _style(name: str) -> dict:
    if name.startswith(UNIT):
        return {
            "color": UNIT_COLOUR,
            "marker": "o",
            "linestyle": "-" if name == UNIT else "--",
            "linewidth": 2.8,
            "markersize": 7,
            "zorder": 3,
        }
    index = [other for other in BLOCKS if not other.startswith(UNIT)].index(name)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": "-" if index < len(COLOURS) else "--",
        "linewidth": 1.3,
        "markersize": 5,
    }


def plot_growth(grown: dict[str, dict], channels: int) -> Figure:
    """Time and memory of each block against N, both axes logarithmic; a row of panels for each mode."""
    figure = Figure(figsize=(13, 9.5), layout="constrained")
    axes = figure.subplots(len(MODES), 2, sharex=True, squeeze=False)
    for mode, (left, right) in zip(MODES, axes, strict=True):
        for name, block in grown[mode].items():
            n = [point["n"] for point in block["points"]]
            left.plot(n, [point["seconds"]["median"] for point in block["points"]], label=name, **_style(name))
            right.plot(n, [point["bytes"] / 2**20 for point in block["points"]], label=name, **_style(name))
        for axis, quantity in ((left, "time [s]"), (right, "peak memory beyond the input [MiB]")):
            axis.set(xscale="log", yscale="log", ylabel=f"{mode}: {quantity}")
            axis.grid(which="major", alpha=0.35)
            axis.grid(which="minor", alpha=0.12)
            axis.tick_params(labelbottom=True)
    for axis in axes[-1]:
        axis.set_xlabel("positions N")
    figure.suptitle(f"One sample, C = {channels}. A line ends where the next size would pass a limit.")
    handles, labels = axes[-1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def plot_costs(tables: list[dict]) -> Figure:
    """Bars of time (with quartiles) and of peak memory, a row of panels for each table."""
    figure = Figure(figsize=(13, 5.2 * len(tables)), layout="constrained")
    panels = figure.subplots(len(tables), 3, sharey=True, squeeze=False)
    for table, (forward, step, peak) in zip(tables, panels, strict=True):
        names = list(table["blocks"])[::-1]
        rows = [table["blocks"][name] for name in names]
        colours = [UNIT_COLOUR if name.startswith(UNIT) else "#B0B0B0" for name in names]
        for axis, mode in ((forward, MODES[0]), (step, MODES[1])):
            medians = [1e3 * row[mode]["median"] for row in rows]
            spread = [[1e3 * abs(row[mode]["quartiles"][i] - row[mode]["median"]) for row in rows] for i in (0, 1)]
            axis.barh(names, medians, xerr=spread, color=colours, ecolor="#000000", capsize=2)
            _label(axis, medians, [1e3 * row[mode]["quartiles"][1] for row in rows])
            axis.set_xlabel(f"{mode}, median and quartiles [ms]")
        memory = [row[MODES[1]]["peak"] / 2**20 for row in rows]
        peak.barh(names, memory, color=colours)
        _label(peak, memory, memory)
        peak.set_xlabel(f"{MODES[1]}, peak memory beyond the input [MiB]")
        forward.set_title(f"input {tuple(table['shape'])}, {table['dtype']}", loc="left")
    return figure


def plot_grid(cells: list[dict]) -> Figure:
    """The ratio of each cell, as a colour and a number: a panel for each mode, white at 1.00."""
    rows = list(dict.fromkeys((cell["precision"], grid.input_name(cell)) for cell in sorted(cells, key=_in_order)))
    columns = sorted({(cell["side"], cell["batch"]) for cell in cells})
    panels = {
        mode if variant == "eager" else f"{mode}, {variant}": [cell for cell in group if cell["mode"] == mode]
        for variant, group in grid.variants(cells).items()
        for mode in grid.CELL_MODES
    }
    size = (4 + 0.62 * len(columns), len(panels) * (1.4 + 0.34 * len(rows)))
    figure = Figure(figsize=size, layout="constrained")
    colours = colormaps["PuOr_r"].with_extremes(bad="#E4E4E4")
    limit = math.log2(FARTHEST)
    for axis, (title, panel) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True):
        values = np.full((len(rows), len(columns)), np.nan)
        for cell in panel:
            place = rows.index((cell["precision"], grid.input_name(cell))), columns.index((cell["side"], cell["batch"]))
            values[place] = grid.ratio(cell)
        image = axis.imshow(np.log2(values), cmap=colours, vmin=-limit, vmax=limit, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            text = "–" if np.isnan(value) else f"{value:.2f}"
            is_dark = abs(math.log2(value)) > 0.6 * limit if value > 0 else False
            axis.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if is_dark else "black")
        axis.set_yticks(range(len(rows)), [", ".join(row) for row in rows])
        axis.set_xticks(range(len(columns)), [f"{side}×{side}\n{batch}" for side, batch in columns])
        axis.set(xlabel="positions H×W, and batch below", ylabel="precision, input")
        axis.set_title(title, loc="left")
    ticks = [1 / FARTHEST, 0.7, 0.85, 1, 1.2, 1.4, FARTHEST]
    bar = figure.colorbar(image, ax=figure.axes, extend="both", ticks=np.log2(ticks), aspect=40)
    bar.ax.set_yticklabels([f"{tick:.2f}" for tick in ticks])
    bar.set_label("EMAUnit's time / the published unit's (below 1.00 EMAUnit is faster)")
    figure.suptitle("A dash is a cell that is not measured.")
    return figure


def _in_order(cell: dict) -> tuple:
    """Float32 first, then images before tokens, narrow before wide."""
    return cell["precision"] != "float32", cell["precision"] == "bfloat16 autocast", cell["tokens"], cell["channels"]


def _label(axis: Axes, values: list[float], ends: list[float]) -> None:
    """Writes each number to the right of the end of its bar."""
    for i, (value, end) in enumerate(zip(values, ends, strict=True)):
        text = f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
        axis.annotate(text, (end, i), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set_xlim(0, 1.2 * max(ends))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.spines[["top", "right"]].set_visible(False)
