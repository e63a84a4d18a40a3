"""Tables and pictures of what a block adds to a network, from the rows that ``benchmarks.accuracy.sweep`` has written.

python -m benchmarks.accuracy                          report.md and its pictures, next to the rows
python -m benchmarks.accuracy --measure                times of the networks first: on a machine that does nothing else
python -m benchmarks.accuracy --readme README.md       also the table between the README's markers
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.accuracy.gradient_plots import plot_gradients, plot_small_classes
from benchmarks.accuracy.gradients import EARLY
from benchmarks.accuracy.network_costs import measure_networks
from benchmarks.accuracy.score_plots import plot_bases, plot_learning, plot_stages, plot_starts
from benchmarks.accuracy.score_tables import (
    NAMES,
    SCORES,
    TITLES,
    ablation_table,
    branch_table,
    class_table,
    full_size_rate_table,
    half_rate_table,
    readme_table,
    score_table,
    start_table,
    task_table,
)
from benchmarks.accuracy.scores import DATA, like_for_like, origin, runs_of
from benchmarks.accuracy.sweep_runs import FOLDER, ROWS, Rows, planned_runs, read_rows
from benchmarks.accuracy.tasks import FIXED_BASES, LEADING, RUN_OF_BASES, RUN_OF_STAGES, TASKS, TWO_RATES
from benchmarks.blocks import TRAINED
from benchmarks.plot_style import png
from benchmarks.reporting import read_results, update_readme, write_files

README_MARKERS = ("<!-- accuracy table: begin -->", "<!-- accuracy table: end -->")


def report(rows: Rows, networks: dict[str, Any]) -> tuple[str, dict[str, Figure]]:
    """The report, and its pictures by the names of their files. It leaves out what has no run yet."""
    env = networks["environment"]
    pictures = {}
    lines = [
        "# What each block adds",
        "",
        "The same network with each block in the same place, trained end to end. There is a run for each seed. Its",
        "checkpoint is chosen on the validation set, and its score is that on the test set. mIoU in percent, mean ±",
        f"standard deviation over seeds. {NAMES}",
        "",
        "`python -m benchmarks.accuracy.sweep --root CAMVID` ([runs.jsonl](runs.jsonl): recipe, machine, commit).",
        f"{len(rows)} of the {len(planned_runs())} planned runs are done.",
        "",
        f"Costs: `python -m benchmarks.accuracy --measure`, {env['machine']}, {env['device']},",
        f"threads {env['threads']}, PyTorch {env['torch']}, commit {env['commit']}; median [quartiles], the",
        "networks in turns. Forward: one image, as in the evaluation. Training step: forward and backward of a batch,",
        "as in the recipe.",
        "",
        "## Every block",
        "",
        *score_table(rows, TRAINED),
        "",
    ]
    for task, title in TITLES.items():
        of_task = [row for row in rows if row["task"] == task]
        if not of_task:
            continue
        recipe = asdict(TASKS[task].recipe)
        (height, width), (crop_height, crop_width) = TASKS[task].size, TASKS[task].crop
        recipe = ", ".join(f"{name} {value}" for name, value in recipe.items() if name != "seed")
        lines += [
            f"## {title}",
            "",
            f"Images {width}×{height}, trained on {crop_width}×{crop_height}. Recipe: {recipe}.",
            origin(of_task),
            "",
        ]
        lines += [*task_table(rows, networks, task), "", f"![learning curves]({task}.png)", ""]
        pictures[f"{task}.png"] = plot_learning(rows, task)
        if task == "camvid-full":
            lines += [
                "Published, trained for longer: ENet 51.3 (Paszke et al., arXiv 1606.02147), SegNet 60.1",
                "(Badrinarayanan et al., arXiv 1511.00561), FC-DenseNet103 66.9 (Jégou et al., arXiv 1611.09326).",
                "",
            ]
            lines += ["The learning rates that were tried, without a block and with seed 0:", ""]
            lines += [*full_size_rate_table(rows), ""]
        if task != "digits":
            lines += ["IoU of every class, mean over the seeds:", "", *class_table(rows, task), ""]
        if TRAINED.keys() <= TASKS[task].blocks.keys():
            lines += [f"### Start and gradient: {SCORES[task]}", "", *start_table(rows, task), ""]
            lines += [f"![score against γ for each gradient]({task}-starts.png)", ""]
            pictures[f"{task}-starts.png"] = plot_starts(rows, task)
            if task == "digits":
                lines += ["### With the key unmarked, where a network can only guess", ""]
                lines += [*start_table(rows, task, "test_unmarked"), ""]
            lines += [
                f"### What reaches the backbone: {DATA[task]}",
                "",
                "The norm of the gradient that reaches x through the attention, divided by that of the one through the",
                f"sum with x; the mean of steps 1 to {EARLY - 1}:",
                "",
                *branch_table(rows, task),
                "",
                "This ratio and the norm of the backbone's gradient by step, and that norm by stage. A point is the",
                "mean from its step to the next point.",
                "",
                f"![gradients by step and by stage]({task}-gradients.png)",
                "",
            ]
            pictures[f"{task}-gradients.png"] = plot_gradients(rows, task)
            if task != "digits":
                lines += [f"![IoU of small classes by step]({task}-small.png)", ""]
                pictures[f"{task}-small.png"] = plot_small_classes(rows, task)
    if any(runs_of(rows, task, block, share=0.5) for task in TWO_RATES for block in LEADING):
        lines += ["## Half the learning rate", "", *half_rate_table(rows), ""]
    bases = like_for_like(rows, "mobilenet", [*RUN_OF_BASES.values(), FIXED_BASES, "no block"])
    if sum(block in bases for block in RUN_OF_BASES.values()) > 1:
        pictures["bases.png"] = plot_bases(bases)
        lines += ["## Bases and moving average", "", *ablation_table(bases, "K = 64"), ""]
        lines += ["![mIoU against K](bases.png)", ""]
    stages = like_for_like(rows, "mobilenet", RUN_OF_STAGES.values())
    if len(stages) > 1:
        pictures["stages.png"] = plot_stages(stages)
        lines += ["## EM stages in training and in evaluation", "", *ablation_table(stages, "T = 3"), ""]
        lines += ["![mIoU for each pair](stages.png)", ""]
    return "\n".join(lines), pictures


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--results", type=Path, default=FOLDER, help="the folder of rows and report (default: %(default)s)"
    )
    parser.add_argument("--measure", action="store_true", help="measure the networks' costs first: three minutes")
    parser.add_argument("--readme", type=Path, help="also put the table into this file, between its markers")
    args = parser.parse_args(arguments)
    costs = args.results / "costs.json"
    try:
        rows = read_rows(args.results / ROWS.name)
        if args.measure:
            networks = measure_networks("cuda" if torch.cuda.is_available() else "cpu")
            write_files(args.results, {costs.name: (json.dumps(networks, indent=1) + "\n").encode()})
        if not costs.exists():
            raise ValueError(f"{costs} does not exist: --measure makes it")
        networks = read_results(costs)
        for name, task in TASKS.items():
            expected, got = task.compared(), networks.get("networks", {}).get(name, {}).get("blocks", {})
            if got.keys() != set(expected):
                raise ValueError(
                    f"{costs} must have the costs of {', '.join(expected)} in {name}; got {', '.join(got) or 'none'}: "
                    "--measure makes it again"
                )
        text, pictures = report(rows, networks)
        files = {"report.md": text.encode()} | {name: png(figure) for name, figure in pictures.items()}
        write_files(args.results, files)
        if args.readme:
            update_readme(args.readme, README_MARKERS, readme_table(rows))
    except (OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    print(args.results / "report.md")


if __name__ == "__main__":
    main()
