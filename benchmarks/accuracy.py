"""Tables and pictures of what a block adds to a network, from the rows that ``benchmarks.sweep`` has written.

python -m benchmarks.accuracy                          report.md and its pictures, beside the rows
python -m benchmarks.accuracy --measure                times of the networks first: on a machine that does nothing else
python -m benchmarks.accuracy --readme README.md       also the table between the README's markers
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.measure import environment, interleaved, macs, parameters, summary
from benchmarks.pictures import COLOURS, MARKERS, UNIT_COLOUR, png
from benchmarks.report import markdown_table, milliseconds, update_readme, write_atomically
from benchmarks.sweep import (
    BASES,
    BLOCKS,
    EVALUATED_STAGES,
    FIXED_BASES,
    RESULTS,
    SEEDS,
    STAGES,
    TASKS,
    Task,
    read_rows,
)
from examples.emanet.data import CAMVID_NAMES
from examples.emanet.train import PRECISIONS

Rows = Sequence[dict[str, Any]]
FOLDER = RESULTS.parent
README_MARKERS = ("<!-- accuracy table: begin -->", "<!-- accuracy table: end -->")
TITLES = {
    "digits": "Digits that equal the key: what has to be known is far away",
    "mobilenet": "CamVid, MobileNetV2 with ImageNet's weights",
    "resnet18": "CamVid, ResNet-18 from scratch",
}
UNIT = "EMAUnit, none"
"""The paper's settings."""


def runs_of(rows: Rows, task: str, block: str) -> Rows:
    """The rows of a block on a task, a seed each."""
    return [row for row in rows if (row["task"], row["block"]) == (task, block)]


def count_seeds(runs: Rows) -> str:
    return "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"


def percent(iou: Sequence[float]) -> float:
    """The mean over the classes."""
    return 100 * torch.tensor(iou).nanmean().item()


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds; of a single one its value."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def measure_networks(device: str, seconds: float = 40) -> dict[str, Any]:
    """Parameters, MACs and time of the network of every task and block: a forward of one image, and a training step.

    The step is that of the task's recipe, on crops and in the precision that it trains with, without the optimizer.
    """
    results: dict[str, Any] = {"environment": environment(device), "networks": {}}
    for name, task in tqdm(TASKS.items(), "measuring", unit="task"):
        networks = {block: task.network(BLOCKS[block]).to(device) for block in BLOCKS}
        image = torch.randn(1, 3, *task.size, device=device).contiguous(memory_format=torch.channels_last)
        rows = {
            block: {"parameters": parameters(network), "macs": macs(network.eval(), image)}
            for block, network in networks.items()
        }
        for kind, make, share in (("forward", forward_of, 0.2), ("training step", step_of, 1)):
            calls = {block: make(network, task) for block, network in networks.items()}
            for block, samples in interleaved(calls, seconds=share * seconds, device=device).items():
                rows[block][kind] = summary(samples)
        results["networks"][name] = {"batch": task.recipe.batch, "size": task.size, "crop": task.crop, "blocks": rows}
    return results


def forward_of(network: nn.Module, task: Task) -> Callable[[], object]:
    """A forward of one image in eval mode, as in an evaluation."""
    device = next(network.parameters()).device
    image = torch.randn(1, 3, *task.size, device=device)

    @torch.no_grad()
    def forward() -> Tensor:
        return network.eval()(image)

    return forward


def step_of(network: nn.Module, task: Task) -> Callable[[], object]:
    """A forward and a backward of a batch in training mode."""
    device = next(network.parameters()).device
    batch = torch.randn(task.recipe.batch, 3, *task.crop, device=device).contiguous(memory_format=torch.channels_last)
    dtype = PRECISIONS[task.recipe.precision]

    def step() -> None:
        network.train().zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = network(batch)
        logits.float().square().mean().backward()

    return step


def task_table(rows: Rows, networks: dict[str, Any], task: str) -> list[str]:
    """What each block adds: IoU on the test set over seeds, beside what the network costs."""
    costs = networks["networks"][task]
    head = ["block", "mIoU", "seeds", "parameters", "GMAC", "forward, ms", "training step, ms"]
    if task == "digits":
        head[1:1] = ["IoU of the wanted digits", "the same, key unmarked"]
    cells = []
    for block in BLOCKS:
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
    for block in BLOCKS:
        runs = runs_of(rows, task, block)
        if runs:
            means = 100 * torch.tensor([run["test"] for run in runs]).nanmean(0)
            cells.append([block, *(f"{value:.1f}" for value in means.tolist())])
    return markdown_table(["block", *CAMVID_NAMES], cells)


def plot_learning(rows: Rows, task: str) -> Figure:
    """MIoU on the validation set over the steps: the seeds' mean, with a bar from the least to the most."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    ax = figure.subplots()
    recipe = TASKS[task].recipe
    for i, block in enumerate(BLOCKS):
        runs = runs_of(rows, task, block)
        if not runs:
            continue
        curves = {int(step): [percent(run["val"][step]) for run in runs] for step in runs[0]["val"]}
        aside = recipe.evaluate_every * 0.05 * (i - len(BLOCKS) // 2)  # so that no bar hides another
        means = [statistics.mean(values) for values in curves.values()]
        below, above = (
            [abs(pick(values) - mean) for values, mean in zip(curves.values(), means, strict=True)]
            for pick in (min, max)
        )
        is_unit = block.startswith("EMAUnit")
        ax.errorbar(
            [step + aside for step in curves],
            means,
            [below, above],
            color=UNIT_COLOUR if is_unit else COLOURS[i],
            linestyle={"EMAUnit, last": "--", "EMAUnit, all": ":"}.get(block, "-"),
            linewidth=2.4 if is_unit else 1.4,
            marker=MARKERS[i],
            markersize=5,
            elinewidth=1,
            capsize=2,
            label=f"{block} ({count_seeds(runs)})" if len(runs) != len(SEEDS) else block,
        )
    ax.set(xlabel="training steps", ylabel="mIoU on val [%], mean and range of the seeds")
    ax.set(xticks=range(0, recipe.steps + 1, recipe.evaluate_every))
    ax.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def like_for_like(rows: Rows, blocks: Iterable[str]) -> dict[str, Rows]:
    """MobileNetV2's runs of the blocks that have any, of the seeds that all of these have."""
    runs = {block: found for block in blocks if (found := runs_of(rows, "mobilenet", block))}
    seeds = set.intersection(*({run["seed"] for run in found} for found in runs.values())) if runs else set()
    return {block: [run for run in found if run["seed"] in seeds] for block, found in runs.items() if seeds}


def seeds_of(runs: dict[str, Rows]) -> list[str]:
    """What an ablation was run on, in words."""
    seeds = sorted({run["seed"] for found in runs.values() for run in found})
    return [f"CamVid, MobileNetV2, the same recipe; seeds: {', '.join(map(str, seeds))}."]


def scores_of(runs: Rows) -> list[float]:
    return [percent(run["test"]) for run in runs]


def plot_bases(runs: dict[str, Rows]) -> Figure:
    """Scores against the number of bases K, and without the moving average; a line through the means."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    scores = {k: scores_of(runs[block]) for k, block in BASES.items() if block in runs}
    for k, values in scores.items():
        ax.plot([k] * len(values), values, "o", color=UNIT_COLOUR, alpha=0.5)
    means = [statistics.mean(values) for values in scores.values()]
    ax.plot(list(scores), means, color=UNIT_COLOUR, label="moving average")
    if fixed := runs.get(FIXED_BASES):
        ax.plot([64] * len(fixed), scores_of(fixed), "X", color=COLOURS[1], label="fixed bases, K = 64")
    if nothing := runs.get("no block"):
        ax.axhline(statistics.mean(scores_of(nothing)), color="#000000", linestyle="--", linewidth=1, label="no block")
    ax.set(xscale="log", xticks=list(BASES), xticklabels=list(BASES), xlabel="bases K", ylabel="mIoU on test [%]")
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def plot_stages(runs: dict[str, Rows]) -> Figure:
    """MIoU for each number of EM stages in training and in evaluation, the mean over the seeds."""
    trained = [stages for stages, block in STAGES.items() if block in runs]
    grid = torch.tensor(
        [
            [
                statistics.mean(percent(run["test_by_stages"][str(t)]) for run in runs[STAGES[stages]])
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


def report(rows: Rows, networks: dict[str, Any]) -> tuple[str, dict[str, Figure]]:
    """The report and its pictures, by the names of their files; what has no run yet is left out."""
    env = networks["environment"]
    pictures = {}
    lines = [
        "# What each block adds",
        "",
        "The same network with each block in the same place, trained end to end. A run is a seed: trained on the",
        "training set, its checkpoint chosen on the validation set, reported on the test set. mIoU in percent, mean ±",
        "standard deviation over seeds. The word behind EMAUnit is its `gradient`; `none` is the paper.",
        "",
        "Rows: `python -m benchmarks.sweep --root CAMVID` ([runs.jsonl](runs.jsonl): recipe, machine, commit).",
        f"Costs: `python -m benchmarks.accuracy --measure`, {env['machine']}, {env['device']},",
        f"threads {env['threads']}, PyTorch {env['torch']}; median [quartiles], the networks in turns. Forward: one",
        "image, as in the evaluation. Training step: forward and backward of a batch, as in the recipe.",
        "",
    ]
    for task, title in TITLES.items():
        if not any(row["task"] == task for row in rows):
            continue
        recipe = next(row["recipe"] for row in rows if row["task"] == task)
        (height, width), (crop_height, crop_width) = TASKS[task].size, TASKS[task].crop
        recipe = ", ".join(f"{name} {value}" for name, value in recipe.items() if name != "seed")
        lines += [
            f"## {title}",
            "",
            f"Images {width}×{height}, trained on {crop_width}×{crop_height}. Recipe: {recipe}.",
            "",
        ]
        lines += [*task_table(rows, networks, task), "", f"![learning curves]({task}.png)", ""]
        pictures[f"{task}.png"] = plot_learning(rows, task)
        if task != "digits":
            lines += ["IoU of every class, mean over the seeds:", "", *class_table(rows, task), ""]
    bases = like_for_like(rows, [*BASES.values(), FIXED_BASES, "no block"])
    if sum(block in bases for block in BASES.values()) > 1:
        pictures["bases.png"] = plot_bases(bases)
        lines += ["## Bases and moving average", "", *seeds_of(bases), "", "![mIoU against K](bases.png)", ""]
    stages = like_for_like(rows, STAGES.values())
    if len(stages) > 1:
        pictures["stages.png"] = plot_stages(stages)
        lines += ["## EM stages in training and in evaluation", "", *seeds_of(stages), ""]
        lines += ["![mIoU for each pair](stages.png)", ""]
    return "\n".join(lines), pictures


def readme_table(rows: Rows) -> str:
    """The score of every block on each task, and the commands that made it."""
    heads = {
        "digits": "digit scenes, IoU of the wanted digits",
        "mobilenet": "CamVid, MobileNetV2, mIoU",
        "resnet18": "CamVid, ResNet-18, mIoU",
    }
    columns = {}
    for task in TITLES:
        runs = {block: runs_of(rows, task, block) for block in BLOCKS}
        if any(runs.values()):
            fewest, most = (pick(map(len, runs.values())) for pick in (min, max))
            seeds = count_seeds(runs_of(rows, task, UNIT)) if fewest == most else f"{fewest} to {most} seeds"
            score = (lambda run: 100 * run["test"][1]) if task == "digits" else (lambda run: percent(run["test"]))
            columns[f"{heads[task]}, {seeds}"] = [spread([score(run) for run in runs[block]]) for block in BLOCKS]
    cells = [[block, *scores] for block, *scores in zip(BLOCKS, *columns.values(), strict=True)]
    caption = (
        "`python -m benchmarks.sweep --root CAMVID`, `python -m benchmarks.accuracy`; percent on the test set, mean ± "
    )
    caption += "standard deviation over seeds. The word behind EMAUnit is its `gradient`; `none` is the paper's."
    return "\n".join([caption, "", *markdown_table(["block", *columns], cells), ""])


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
        rows = read_rows(args.results / RESULTS.name)
        if args.measure:
            networks = measure_networks("cuda" if torch.cuda.is_available() else "cpu")
            write_atomically(costs, (json.dumps(networks, indent=1) + "\n").encode())
        if not costs.exists():
            raise ValueError(f"{costs} does not exist: --measure makes it")
        networks = json.loads(costs.read_text())
        text, pictures = report(rows, networks)
        write_atomically(args.results / "report.md", text.encode())
        for name, figure in pictures.items():
            write_atomically(args.results / name, png(figure))
        if args.readme:
            update_readme(args.readme, README_MARKERS, readme_table(rows))
    except (OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    print(args.results / "report.md")


if __name__ == "__main__":
    main()
