"""Pictures of what ``benchmarks.accuracy.segments`` has found."""

from __future__ import annotations

import statistics
import textwrap
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from benchmarks.accuracy.scores import deviation, percent
from benchmarks.accuracy.segment_tables import METHODS, all_bases, rows_of
from benchmarks.plot_style import COLOURS, MARKERS, UNIT_COLOUR
from examples._common.samples import IGNORE, Colours
from examples.emanet.data import Segmentation

DARKEST, LIGHTEST = -0.35, 0.45
"""How much of black, or of white, is in the shades of a class at the ends."""


def shades(classes: Tensor, colours: Colours) -> np.ndarray:
    """A colour (K, 3) from 0 to 1 for each basis: its class's, in a shade of its own."""
    found = np.empty((len(classes), 3))
    for label in classes.unique().tolist():
        bases = (classes == label).nonzero()[:, 0]
        amounts = [0.0] if len(bases) == 1 else np.linspace(DARKEST, LIGHTEST, len(bases))
        for basis, amount in zip(bases.tolist(), amounts, strict=True):
            found[basis] = (1 - abs(amount)) * np.array(colours[label]) / 255 + max(amount, 0.0)
    return found


def plot_frames(dataset: Segmentation, maps: dict[str, tuple[Tensor, Tensor]], shown: list[int]) -> Figure:
    """Frames of a data set, their labels, and the bases of each method.

    Args:
        dataset: what the frames are from.
        maps: for each method the basis of every position (frames, rows, columns), and the class (K,) of every basis.
        shown: the frames, by their indices in the data set.
    """
    samples = [(image.permute(1, 2, 0).numpy(), mask.numpy()) for image, mask in map(dataset.__getitem__, shown)]
    palette = np.zeros((IGNORE + 1, 3))  # without a label, black
    palette[: len(dataset.colours)] = np.array(dataset.colours) / 255
    rows = {"frame": [image for image, _ in samples], "labels": [palette[mask] for _, mask in samples]}
    seen = {label for _, mask in samples for label in np.unique(mask).tolist() if label != IGNORE}
    for method, (bases, classes) in maps.items():
        colours = shades(classes, dataset.colours)
        rows[method] = [colours[frame] for frame in bases.numpy()]
        seen |= set(classes[bases.unique()].tolist())
    height, width = samples[0][1].shape
    side = 1.6  # of a frame, in inches
    figure = Figure((side * len(shown) + 0.5, (side * height / width + 0.06) * len(rows) + 0.6), layout="constrained")
    for axes, (name, pictures) in zip(figure.subplots(len(rows), len(shown), squeeze=False), rows.items(), strict=True):
        axes[0].set_ylabel(textwrap.fill(name, 19), fontsize=7.5)
        for ax, picture in zip(axes, pictures, strict=True):
            ax.imshow(picture, extent=(0, width, height, 0), interpolation="nearest" if name != "frame" else None)
            ax.set(xticks=[], yticks=[])
    for ax, index in zip(figure.axes, shown, strict=False):
        ax.set_title(f"frame {index + 1} of {len(dataset)}", fontsize=8)
    patches = [Patch(facecolor=palette[label], edgecolor="black", label=dataset.names[label]) for label in sorted(seen)]
    patches.append(Patch(facecolor="black", edgecolor="black", label="no label"))
    figure.legend(
        handles=patches,
        loc="outside lower center",
        ncols=len(patches),
        frameon=False,
        fontsize=7.5,
        columnspacing=1,
        handlelength=1.2,
    )
    return figure


def plot_scores(results: dict[str, Any]) -> Figure:
    """MIoU against K, mean and standard deviation over the seeds: with the classes of training, and with the oracle."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    bases = all_bases(results)
    panels = {"iou": "classes by the majority in training", "oracle": "oracle: by the majority in that very frame"}
    for ax, (kind, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for i, method in enumerate(METHODS):
            scores = [[percent(row[kind]) for row in rows_of(results, method, k)] for k in bases]
            ax.errorbar(
                [k * 1.04 ** (i - 2) for k in bases],  # so that no bar hides another
                [statistics.mean(values) for values in scores],
                list(map(deviation, scores)),
                color=UNIT_COLOUR if i == 0 else COLOURS[i],
                marker=MARKERS[i],
                markersize=5,
                capsize=2,
                label=method,
            )
        ax.set_title(title, fontsize=10)
        ax.set(xscale="log", xticks=bases, xticklabels=bases, xlabel="bases K", ylabel="mIoU on val [%]")
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure
