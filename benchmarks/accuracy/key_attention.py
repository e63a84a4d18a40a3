"""What the key of a digit scene attends to while a network is trained, for three units.

python -m benchmarks.accuracy.key_attention    key_attention.md and .png: six minutes on 2 cores

But for the lengths of the bases, which EM sets to 1, EM attention gives position q a mean over all positions. In it
position n has the weight Σ_k z_qk · z_nk / Σ_m z_mk. If the network has learned the task by attention, the digits that
equal the key have large weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.tv_tensors import Image
from tqdm import tqdm

from benchmarks.accuracy.sweep_runs import FOLDER
from benchmarks.accuracy.tasks import RECOMMENDED, TASKS
from benchmarks.blocks import DEFAULTS, TRAINED, MakeBlock, unit_name
from benchmarks.environment import commit, machine
from benchmarks.plot_style import png
from benchmarks.reporting import markdown_table, write_files
from ema_attention import collect_attention_maps
from examples._common.evaluation import evaluation_mode
from examples._common.recipe import make_learner
from examples._common.samples import Batches, Drawn, normalisation, seed_everything
from examples._common.training import training_step
from examples.digit_scenes import GRID, KEY_CELL, THRESHOLD, DigitScenes, ShortSightedNet

UNITS = (DEFAULTS, unit_name("all", 1), RECOMMENDED)
STEPS = (0, 200, 2_000)
SCENES, SHOWN = 200, 3
PLACES = ("the key's cell", "digits that equal it", "other digits", "background")
BRIGHTEST = 6  # times the mean
COMMIT = commit()  # of the code that this process has read; it may change while networks are trained


def key_cells(images: Tensor) -> Tensor:
    """Which cells (B, GRID, GRID) of scenes (B, 3, 64, 64), from 0 to 255, hold the key: the blue ones."""
    return -F.max_pool2d(-images[:, 2].float(), images.shape[-1] // GRID) == KEY_CELL[2]


def places(images: Tensor, labels: Tensor, size: int) -> Tensor:
    """Which of ``PLACES`` each of size × size positions shows, (B, size, size), of scenes with labels (B, 64, 64)."""
    side = images.shape[-1] // size
    strokes = torch.stack([labels == DigitScenes.wanted, images[:, 0] > 255 * THRESHOLD], 1)
    equal, any_digit = F.max_pool2d(strokes.float(), side).bool().unbind(1)
    is_key = key_cells(images).repeat_interleave(size // GRID, 1).repeat_interleave(size // GRID, 2)
    return torch.where(is_key, 0, torch.where(equal, 1, torch.where(any_digit, 2, 3)))


def attention_of_key(is_key: Tensor, z: Tensor) -> Tensor:
    """The weight (B, H, W) of each position in what the positions in is_key (B, H, W) get, times N.

    It is the mean over these positions, from maps z (B, K, H, W).
    """
    weights = (z * is_key[:, None]).sum((2, 3)) / is_key.sum((1, 2))[:, None]  # (B, K): of each basis
    shares = z / z.mean((2, 3), keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
    return torch.einsum("bk,bkhw->bhw", weights, shares)


def maps_while_training(make_block: MakeBlock, images: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Trains a network as the sweep does with seed 0, and gives the maps of scenes at each of ``STEPS``."""
    task = TASKS["digits"]
    recipe = replace(task.recipe, steps=STEPS[-1])
    seed_everything(recipe.seed)
    net = task.network(make_block)
    learner = make_learner(net, recipe, torch.device("cpu"))
    scenes = task.data(None, "train")
    batches = Batches(len(scenes), recipe.batch, 0, recipe.steps, recipe.seed)
    loader = DataLoader(Drawn(scenes, task.transform, recipe.seed), batch_sampler=batches)
    net.train()
    for step, (image, mask) in enumerate(tqdm(loader, "training", unit="step", leave=False)):
        if step in STEPS:
            yield step, maps_of(net, images)
        seed_everything(recipe.seed, step, 0)
        training_step(learner, net, image.to(memory_format=torch.channels_last), mask, recipe.precision)
    yield recipe.steps, maps_of(net, images)


@torch.no_grad()
def maps_of(net: ShortSightedNet, images: Tensor) -> Tensor:
    """The maps (B, K, H, W) of the network's unit, as it evaluates scenes."""
    with evaluation_mode(net), collect_attention_maps(net) as maps:
        net(normalisation(Image(images)))
    return maps["block"]


def plot(images: Tensor, attention: dict[str, dict[int, Tensor]]) -> Figure:
    """Scenes, and beside each what its key attends to: for each unit and step but the first, where it is the mean."""
    steps = [(unit, step) for unit, of_unit in attention.items() for step in of_unit if step]
    figure = Figure((1.3 * (len(steps) + 1) + 0.6, 1.3 * SHOWN + 0.6), layout="constrained")
    axes = figure.subplots(SHOWN, len(steps) + 1)
    for row, image in enumerate(images[:SHOWN]):
        axes[row, 0].imshow(image.movedim(0, -1).numpy())
        for ax, (unit, step) in zip(axes[row, 1:], steps, strict=True):
            heat = ax.imshow(attention[unit][step][row].numpy(), "cividis", vmin=0, vmax=BRIGHTEST)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    for ax, (unit, step) in zip(axes[0, 1:], steps, strict=True):
        ax.set_title(f"{unit}\nstep {step:,}", fontsize=7)
    axes[0, 0].set_title("\nscene", fontsize=7)
    figure.colorbar(heat, ax=axes, label="attention of the key's cell,\ntimes the mean", extend="max")
    return figure


def report(means: dict[str, dict[int, list[float]]]) -> str:
    """The page: the mean attention on each of ``PLACES``."""
    cells = [
        [unit, f"{step:,}", *(f"{mean:.2f}" for mean in of_step)]
        for unit, of_unit in means.items()
        for step, of_step in of_unit.items()
    ]
    lines = [
        "# What the key attends to",
        "",
        "The digit scenes ask for the digits that equal the key. But for the lengths of the bases, EM attention gives",
        "the key's cell a mean over all positions. The table shows how large the weight of a position is, for four",
        f"kinds of positions: 1 is the mean over all of them. It is a mean over {SCENES} scenes of the test set. The",
        "network is trained as in the sweep, with seed 0.",
        "",
        f"`python -m benchmarks.accuracy.key_attention`, {machine()}, PyTorch {torch.__version__}, commit {COMMIT}.",
        "",
        *markdown_table(["unit", "step", *PLACES], cells),
        "",
        "![three scenes, and what their keys attend to](key_attention.png)",
        "",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.key_attention", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder (default: %(default)s)")
    args = parser.parse_args(arguments)
    images, labels = (torch.stack(parts) for parts in zip(*DigitScenes("test", SCENES), strict=True))
    attention: dict[str, dict[int, Tensor]] = {}
    means: dict[str, dict[int, list[float]]] = {}
    for unit in tqdm(UNITS, "units"):
        attention[unit], means[unit] = {}, {}
        for step, z in maps_while_training(TRAINED[unit], images):
            kinds = places(images, labels, z.shape[-1])
            attention[unit][step] = attention_of_key(kinds == 0, z)
            means[unit][step] = [attention[unit][step][kinds == kind].mean().item() for kind in range(len(PLACES))]
    try:
        files = {"key_attention.png": png(plot(images, attention)), "key_attention.md": report(means).encode()}
        write_files(args.output, files)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    print(args.output / "key_attention.md")


if __name__ == "__main__":
    main()
