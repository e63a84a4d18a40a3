"""Markdown from what ``benchmarks.accuracy.segments`` has measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.accuracy.scores import percent, spread
from benchmarks.reporting import markdown_table
from examples.emanet.data import CAMVID_NAMES

JOINT = "joint EM"
SOFT = "joint EM, the demo's scale"
ADAPTED = "joint EM, then 3 stages on each frame"
KMEANS = "MiniBatchKMeans"
AFRESH = "EM afresh in each frame"
METHODS = {
    JOINT: "bases found on all training frames together, {joint_stages} stages; each position gets the strongest",
    SOFT: "the same with scale {demo_scale:g}",
    ADAPTED: "from these bases {frame_stages} stages more on each frame alone, both in training and in validation",
    KMEANS: "scikit-learn's, with batches of {batch:,} positions, on the features of all training frames",
    AFRESH: "{lone_stages} stages on each frame alone; each basis has the class of the most similar joint basis",
}
FITTED = (JOINT, SOFT, KMEANS)
PICTURED = 16
"""The number of bases in the picture of frames, which is of the first seed."""


def rows_of(results: dict[str, Any], method: str, bases: int) -> list[dict[str, Any]]:
    """The rows of a method with K bases, one for each seed."""
    return [row for row in results["rows"] if (row["method"], row["bases"]) == (method, bases)]


def all_bases(results: dict[str, Any]) -> list[int]:
    """The numbers of bases that were measured."""
    return sorted({row["bases"] for row in results["rows"]})


def report(results: dict[str, Any]) -> str:
    """The page: scores, seconds, and the classes."""
    env, settings = results["environment"], results["settings"]
    frames, bases = settings["frames"], all_bases(results)
    (height, width), stride = settings["size"], settings["stride"]
    seeds = sorted({row["seed"] for row in results["rows"]})

    def cells(value: Callable[[Sequence[dict[str, Any]]], str], methods: Sequence[str]) -> list[list[str]]:
        return [[method, *(value(rows_of(results, method, k)) for k in bases)] for method in methods]

    def scores(kind: str) -> Callable[[Sequence[dict[str, Any]]], str]:
        return lambda rows: spread([percent(row[kind]) for row in rows])

    floor, ceiling = (f"{percent(results['bounds'][bound]):.1f}" for bound in ("floor", "ceiling"))
    scales = ", ".join(f"{scale}: {100 * score:.1f}" for scale, score in settings["scales"].items())
    head = ["", *(f"K = {k}" for k in bases)]
    lines = [
        "# The maps as segments",
        "",
        "What K maps say about classes when nobody has trained them. The features are those of the demo, of",
        f"EfficientNet-Lite0 with ImageNet's weights: {settings['channels']} channels at {width // stride}×"
        f"{height // stride} positions of CamVid's frames, {width}×{height}; less their mean over all training",
        f"positions, then of length 1. Bases are found without labels in the {frames['train']} training frames. Then",
        "each basis gets the class that most of its pixels have there. Scores are those of the "
        f"{frames['val']} validation frames. Every position stands for its {stride}×{stride} pixels.",
        "",
        *(f"- *{method}*: {what.format(**settings)}." for method, what in METHODS.items()),
        "",
        f"EM starts from K positions drawn at random. Its scale is {settings['scale']:g}, with which joint EM has the",
        f"best mIoU in training at K = {settings['scale_bases']} ({scales}).",
        f"Mean ± standard deviation over {len(seeds)} seeds.",
        "",
        f"`OMP_NUM_THREADS={env['threads']} python -m benchmarks.accuracy.segments --root CAMVID`",
        f"([segments.json](segments.json)), {env['machine']}, threads {env['threads']}, PyTorch {env['torch']},",
        f"scikit-learn {env['scikit-learn']}, commit {env['commit']}.",
        "",
        "## mIoU in percent",
        "",
        *markdown_table(
            head,
            [
                *cells(scores("iou"), list(METHODS)),
                ["the most frequent class everywhere", *[floor] * len(bases)],
                ["each position's own most frequent class", *[ceiling] * len(bases)],
            ],
        ),
        "",
        "![mIoU against K](segments_scores.png)",
        "",
        "## mIoU with an oracle, in percent",
        "",
        "Each basis gets the class that most of its pixels have in that very frame of validation. No method can know",
        "this: it is what the segments would be worth if somebody named them in each frame.",
        "",
        *markdown_table(head, cells(scores("oracle"), list(METHODS))),
        "",
        "## CPU seconds to find the bases",
        "",
        "From features in memory, mean over the seeds. All times are CPU times. Other work on the machine makes them",
        "longer.",
        "",
        *markdown_table(
            head,
            cells(lambda rows: f"{statistics.mean(row['fit'] for row in rows):.1f}", FITTED),
        ),
        "",
        "## Bases that repeat another",
        "",
        "Mean number of the K bases whose cosine with another is above 0.98. Two such bases do the work of one.",
        "",
        *markdown_table(
            head,
            cells(lambda rows: f"{statistics.mean(row['repeated'] for row in rows):.1f}", FITTED),
        ),
        "",
        "## CPU milliseconds a frame",
        "",
        "From features in memory to the strongest basis of each position, median over the frames, mean over the seeds.",
        f"The features themselves take {1e3 * results['features']['median']:.0f} ms a frame.",
        "",
        *markdown_table(
            head,
            cells(lambda rows: f"{1e3 * statistics.mean(row['frame']['median'] for row in rows):.1f}", list(METHODS)),
        ),
        "",
        "## One colour, one thing",
        "",
        f"Frames of validation, K = {PICTURED}, seed {seeds[0]}. A colour is a class, and its shades are the bases of",
        "this class, the same in all frames. A basis that was found afresh has the shade of the most similar joint",
        "basis.",
        "",
        "![Six frames, their labels, and the bases of each method](segments.png)",
        "",
    ]
    for k in bases:
        means = {m: 100 * torch.tensor([row["iou"] for row in rows_of(results, m, k)]).nanmean(0) for m in METHODS}
        classes = [[method, *(f"{value:.1f}" for value in mean.tolist())] for method, mean in means.items()]
        lines += [f"## IoU of every class, K = {k}", "", *markdown_table(["", *CAMVID_NAMES], classes), ""]
    return "\n".join(lines)
