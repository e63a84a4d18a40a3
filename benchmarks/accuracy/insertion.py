"""What the unit learns in a network that is trained already, as published, and with gradient="all" from three starts.

python -m benchmarks.accuracy.insertion    insertion.md, .png and .json: three quarters of an hour on 2 cores

The network of the digit scenes is trained without a block, as in the sweep. Then each block is put into its best
checkpoint, and all of it is trained on: by the same recipe, and by one with a tenth of the learning rate. Ctrl-C stops
after the current step, and the same command goes on from there. Another commit or PyTorch needs another --folder.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from benchmarks.accuracy.gradient_plots import STYLES
from benchmarks.accuracy.scores import spread
from benchmarks.accuracy.sweep_runs import FOLDER
from benchmarks.accuracy.tasks import RECOMMENDED, TASKS
from benchmarks.blocks import DEFAULTS, TRAINED, unit_name
from benchmarks.environment import commit, machine
from benchmarks.plot_style import png
from benchmarks.reporting import markdown_table, write_files
from examples._common.evaluation import evaluate
from examples._common.files import load_checkpoint
from examples._common.samples import seed_everything
from examples._common.training import fit
from examples.digit_scenes import DigitScenes, ShortSightedNet

TASK = TASKS["digits"]
BEFORE = "before"
INSERTED = ("no block", DEFAULTS, unit_name("all", 0), RECOMMENDED, unit_name("all", 1))
SHARES = {share: f"lr {share * TASK.recipe.lr:g}" for share in (1.0, 0.1)}
"""What shares of the first training's learning rate are called."""
SEEDS = 3
CODE = {"torch": str(torch.__version__), "commit": commit()}  # of the code that this process has read


class Result(NamedTuple):
    """Of a network that was trained: the IoU of the wanted digits, in percent."""

    block: str
    share: float
    """Of the first training's learning rate."""
    seed: int
    test: float
    unmarked: float
    """On the test set without marks on the keys, where a network can only guess."""
    gamma: float | None
    """The largest weight of the unit's last norm, without its sign."""
    val: dict[int, float]
    """By step; 0 is before the training."""


def results(folder: Path, seeds: int) -> Iterator[Result]:
    """Trains what is not in the folder yet. After Ctrl-C it ends, without the network that was in training."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for seed in range(seeds):
        seed_everything(seed)
        net = ShortSightedNet(TRAINED["no block"])
        before = train(net, BEFORE, 1.0, seed, folder / BEFORE / str(seed), device)
        if before is None:
            return
        yield before
        for share in SHARES:
            for block in INSERTED:
                seed_everything(seed)
                inserted = copy.deepcopy(net)
                inserted.block = TRAINED[block](inserted.channels)
                path = folder / f"{block} {share}".replace(" ", "-") / str(seed)
                result = train(inserted, block, share, seed, path, device)
                if result is None:
                    return
                yield result


def train(net: ShortSightedNet, block: str, share: float, seed: int, folder: Path, device: str) -> Result | None:
    """Trains a network at a share of the learning rate, and loads its best checkpoint; None if it was interrupted."""
    recipe = replace(TASK.recipe, seed=seed, lr=share * TASK.recipe.lr)
    sets = {split: TASK.data(None, split) for split in ("train", "val", "test")}
    before = evaluate(net.to(device), sets["val"], device).tolist()
    history = fit(net, sets["train"], sets["val"], TASK.transform, recipe, folder, device, True, network=CODE)
    if recipe.steps not in history:
        return None
    net.load_state_dict(load_checkpoint(folder / "best.pt")["model"])
    unmarked = DigitScenes("test", len(sets["test"]), is_marked=False)
    wanted = DigitScenes.wanted
    test, guessed = (100 * evaluate(net, scenes, device)[wanted].item() for scenes in (sets["test"], unmarked))
    gamma = None if isinstance(net.block, nn.Identity) else net.block.conv2[1].weight.abs().max().item()
    val = {step: 100 * iou[wanted] for step, iou in ({0: before} | history).items()}
    return Result(block, share, seed, test, guessed, gamma, val)


def plot(found: list[Result]) -> Figure:
    """The IoU of the wanted digits on the validation set after the insertion, by step: of each seed, and the mean."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots(1, len(SHARES), sharey=True)
    for ax, (share, name) in zip(axes, SHARES.items(), strict=True):
        for block in INSERTED:
            curves = [result.val for result in found if (result.block, result.share) == (block, share)]
            for curve in curves:
                ax.plot(list(curve), list(curve.values()), linewidth=0.7, **(STYLES[block] | {"marker": ""}))
            means = {step: statistics.mean(curve[step] for curve in curves) for step in curves[0]}
            ax.plot(list(means), list(means.values()), linewidth=2.2, label=block, **STYLES[block])
        ax.set(title=f"trained on with {name}", xlabel="training steps since the insertion")
        ax.grid(alpha=0.3)
    seeds = len({result.seed for result in found})
    axes[0].set_ylabel(f"IoU of the wanted digits on val [%],\n{seeds} seeds (thin) and their mean")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def report(found: list[Result]) -> str:
    """The page: what each block scores at each learning rate."""

    def cells(block: str, share: float) -> list[str]:
        runs = [result for result in found if (result.block, result.share) == (block, share)]
        gammas = [f"{run.gamma:.2f}" for run in runs if run.gamma is not None]
        scores = [spread([run.test for run in runs]), spread([run.unmarked for run in runs])]
        return [block, *scores, ", ".join(gammas) or "–"]

    head = ["block", "IoU of the wanted digits", "the same, key unmarked", "largest γ, by seed"]
    test, unmarked = cells(BEFORE, 1.0)[1:3]
    lines = [
        "# Into a trained network",
        "",
        "The network of the digit scenes is trained without a block, as in the sweep. Then a block is put into its",
        f"best checkpoint, and all of it is trained on for {TASK.recipe.steps:,} steps: by the same recipe, and by one",
        "with a tenth of the learning rate (that of the start; it falls to 0). The batches are those of the first",
        "training. IoU on the test set, in percent: mean ± standard deviation over the seeds. Before the insertion it",
        f"is {test}, and {unmarked} with the key unmarked.",
        "",
        f"`python -m benchmarks.accuracy.insertion` ([each seed](insertion.json)), {machine()},",
        f"PyTorch {CODE['torch']}, commit {CODE['commit']}.",
        "",
    ]
    for share, name in SHARES.items():
        lines += [
            f"## Trained on with {name}",
            "",
            *markdown_table(head, [cells(block, share) for block in INSERTED]),
            "",
        ]
    return "\n".join([*lines, "![scores on the validation set by step](insertion.png)", ""])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.insertion", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("out/insertion"), help="of checkpoints (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder (default: %(default)s)")
    args = parser.parse_args(arguments)
    total = args.seeds * (1 + len(INSERTED) * len(SHARES))
    try:
        if args.seeds < 1:
            raise ValueError(f"--seeds must be at least 1; got {args.seeds}")
        found: list[Result] = []
        with contextlib.suppress(KeyboardInterrupt):  # of an evaluation; a training hears Ctrl-C itself
            found.extend(tqdm(results(args.folder, args.seeds), "networks", total))
        if len(found) < total:
            print(f"stopped; the same command goes on with the networks in {args.folder}")
            return
        files = {
            "insertion.json": json.dumps([result._asdict() for result in found], indent=1).encode(),
            "insertion.png": png(plot(found)),
            "insertion.md": report(found).encode(),
        }
        write_files(args.output, files)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    print(args.output / "insertion.md")


if __name__ == "__main__":
    main()
