"""Trains EMANet, by default as published (Li et al., ICCV 2019, section 4.1), on one CPU, one GPU or many.

python -m examples.emanet.train runs/camvid --data camvid --root CAMVID
torchrun --nproc-per-node 4 -m examples.emanet.train runs/voc --data voc --root VOC --precision bfloat16
python -m examples.emanet.train runs/camvid --data camvid --root CAMVID --resume     goes on where it stopped

Ctrl-C finishes the step that is under way and writes the checkpoint. ``last.pt`` goes on from there, ``best.pt`` is the
network with the best mIoU on the validation set; TensorBoard shows the run: ``tensorboard --logdir runs``.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import PolynomialLR
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2
from tqdm import tqdm

from examples.emanet.checkpoint import load_checkpoint, save_checkpoint
from examples.emanet.data import (
    IGNORE,
    Batches,
    Drawn,
    Segmentation,
    add_data_arguments,
    augmentation,
    open_data,
    seed_everything,
)
from examples.emanet.evaluate import evaluate, mean_iou
from examples.emanet.model import BACKBONES, emanet
from examples.emanet.pictures import plot_segmentation

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCALARS_EVERY = 10  # steps: reading a loss waits for the device


def _setting(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the defaults are the published ones, for PASCAL VOC."""

    steps: int = _setting(30_000, "of the optimizer")
    batch: int = _setting(16, "samples of a step, over all processes")
    lr: float = _setting(9e-3, "learning rate at the start, which falls polynomially; biases have twice it")
    momentum: float = _setting(0.9, "of SGD")
    weight_decay: float = _setting(1e-4, "of the weights of convolutions; norms and biases have none")
    norm_momentum: float = _setting(3e-4, "of BatchNorm's running statistics: the weight of the new ones")
    precision: str = _setting("float32", "the others are by autocast")
    seed: int = _setting(0, "of the weights that are not loaded, of order, augmentation and dropout")
    evaluate_every: int = _setting(1_000, "steps between two evaluations, and between two checkpoints")
    workers: int = _setting(0, "processes that load data; 0 loads it in the training's own")

    def __post_init__(self) -> None:
        """Raises ValueError for numbers and precisions that make no sense."""
        for name in ("steps", "batch", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("lr", "momentum", "weight_decay", "norm_momentum", "seed", "workers"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0; got {getattr(self, name)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {tuple(PRECISIONS)}; got {self.precision!r}")


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """As published: weight decay for the weights of convolutions alone, and biases at twice the rate."""
    decayed, plain, biases = [], [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if name == "bias":
                biases.append(parameter)
            elif isinstance(module, nn.Conv2d):
                decayed.append(parameter)
            else:
                plain.append(parameter)
    return [
        {"params": decayed, "lr": recipe.lr, "weight_decay": recipe.weight_decay},
        {"params": plain, "lr": recipe.lr, "weight_decay": 0.0},
        {"params": biases, "lr": 2 * recipe.lr, "weight_decay": 0.0},
    ]


def fit(
    model: nn.Module,
    train_set: Segmentation,
    val_set: Segmentation,
    transform: v2.Transform,
    recipe: Recipe,
    folder: Path,
    device: torch.device | str = "cpu",
    resume: bool = False,
    network: dict[str, Any] | None = None,
) -> dict[int, list[float]]:
    """Trains ``model``, and returns the IoU of every class on ``val_set`` at each evaluation, by step.

    A step's samples, their augmentation and its dropout depend on the seed and on the step's number alone, so a run
    that was resumed is the run that was not interrupted. After Ctrl-C or SIGTERM it ends with the step that is under
    way. With torch.distributed initialised the processes share each batch, and all hold the same weights and bases.

    Args:
        model: maps images (B, 3, H, W) to logits (B, classes, H, W).
        train_set: raw samples, to which ``transform`` is applied.
        val_set: raw samples; decides which weights are the best ones.
        transform: from a raw sample to a normalised image and its mask, at random.
        recipe: how to train.
        folder: where ``last.pt``, ``best.pt`` and TensorBoard's events go.
        device: of the training.
        resume: go on from ``folder/last.pt``, if it is there.
        network: what the checkpoints tell :func:`load_network` of how to build the model.

    Raises:
        ValueError: if the folder holds a run and ``resume`` is not given, or a run of another network, recipe, data
            set or image size; if processes resume from different steps; if the loss or a weight is not finite.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device(device)
    if ranks > 1 and device.type == "cuda":  # on a CPU PyTorch has none
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = recipe.norm_momentum
    optimizer = torch.optim.SGD(parameter_groups(model, recipe), momentum=recipe.momentum)
    scheduler = PolynomialLR(optimizer, recipe.steps, power=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    facts = {
        "recipe": asdict(recipe),
        "network": network,
        "samples": len(train_set),
        "size": tuple(val_set[0][0].shape[-2:]),
        "transform": " ".join(str(transform).split()),
        "names": train_set.names,
        "colours": train_set.colours,
    }
    step, history = 0, {}
    last, best = folder / "last.pt", folder / "best.pt"
    if last.exists():
        if not resume:
            raise ValueError(f"{folder} holds a run already: resume it, or choose another folder")
        step, history = restore(state, facts, last)
    if ranks > 1:
        steps = [step] * ranks
        dist.all_gather_object(steps, step)
        if len(set(steps)) > 1:
            raise ValueError(f"{last} must be in a folder that all processes share; they are at the steps {steps}")
    parallel = DistributedDataParallel(model) if ranks > 1 else model

    def save(path: Path) -> None:
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise ValueError(f"the weights are not finite at step {step}: try a smaller lr than {recipe.lr}")
        if rank == 0:
            states = {name: part.state_dict() for name, part in state.items()}
            save_checkpoint({"step": step, "history": history, **facts, **states}, path)

    def is_due() -> bool:
        return step > 0 and (step % recipe.evaluate_every == 0 or step == recipe.steps)

    def validate() -> None:
        if ranks > 1:
            share_buffers(model)
        iou = evaluate(model, val_set, device)
        history[step] = iou.tolist()
        if len(history) == 1 or mean_iou(iou) > max(map(mean_iou, list(history.values())[:-1])):
            save(best)
        save(last)  # behind the best: a run that dies in between evaluates again
        if writer:
            bar.write(f"step {step}: mIoU {100 * mean_iou(iou):.2f}")
            show_evaluation(writer, model, val_set, iou, step)

    batches = Batches(len(train_set), recipe.batch, step, recipe.steps, recipe.seed, rank, ranks)
    loader = DataLoader(Drawn(train_set, transform, recipe.seed), batch_sampler=batches, num_workers=recipe.workers)
    with (
        stop_on_signal() as is_stopped,
        SummaryWriter(folder, purge_step=step + 1) if rank == 0 else nullcontext() as writer,
        tqdm(loader, "training", recipe.steps, initial=step, unit="step", disable=rank > 0 or None) as bar,
    ):
        model.train()
        if is_due() and step not in history:
            validate()
        for image, mask in bar:
            seed_everything(recipe.seed, step, rank)
            image = image.to(device, memory_format=torch.channels_last)
            with torch.autocast(device.type, PRECISIONS[recipe.precision], enabled=recipe.precision != "float32"):
                logits = parallel(image)
            mask = mask.to(device)
            loss = F.cross_entropy(logits.float(), mask, ignore_index=IGNORE, reduction="sum")
            loss = loss / (mask != IGNORE).sum().clamp_min(1)  # a batch may have no label at all
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            step += 1
            stopped = agree(is_stopped(), device)
            if writer and step % SCALARS_EVERY == 0:
                scalars = {"loss": loss.item(), "lr": scheduler.get_last_lr()[0]}
                if not math.isfinite(scalars["loss"]):
                    raise ValueError(f"the loss of step {step} is {scalars['loss']}: try a smaller lr than {recipe.lr}")
                bar.set_postfix({name: f"{value:.3g}" for name, value in scalars.items()})
                for name, value in scalars.items():
                    writer.add_scalar(name, value, step)
            if stopped or is_due():
                save(last)  # before the evaluation, which may take longer than is left to a process that has to stop
            if stopped:
                break
            if is_due():
                validate()
    return history


def restore(state: dict[str, Any], facts: dict[str, Any], path: Path) -> tuple[int, dict[int, list[float]]]:
    """Loads a checkpoint into model, optimizer, scheduler and scaler, and returns its step and evaluations.

    Raises:
        ValueError: if the checkpoint is of another network, recipe or data set.
    """
    checkpoint = load_checkpoint(path)
    if not facts.keys() | state.keys() <= checkpoint.keys():
        raise ValueError(f"{path} must be a run's last checkpoint; it has only {', '.join(checkpoint)}")
    for name, value in _settings(facts).items():
        theirs = _settings(checkpoint).get(name)
        if name != "workers" and theirs != value:
            raise ValueError(f"{path} is of a run with {name} = {theirs}; got {name} = {value}")
    for name, part in state.items():
        part.load_state_dict(checkpoint[name])
    return checkpoint["step"], checkpoint["history"]


def _settings(facts: dict[str, Any]) -> dict[str, Any]:
    """What two runs must have in common, by name."""
    alike = {name: facts[name] for name in ("samples", "size", "transform", "names")}
    return {**facts["recipe"], **(facts["network"] or {}), **alike}


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C or SIGTERM has come; a second one interrupts as ever."""
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore_handlers() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        restore_handlers()

    for number in handlers:
        signal.signal(number, note)
    try:
        yield lambda: bool(came)
    finally:
        restore_handlers()


def agree(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up in any process, so that all of them stop after the same step."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags.item())


def share_buffers(model: nn.Module) -> None:
    """Gives every process the first one's running statistics (SyncBatchNorm's are equal already)."""
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


def show_evaluation(writer: SummaryWriter, model: nn.Module, val_set: Segmentation, iou: Tensor, step: int) -> None:
    """TensorBoard's view of an evaluation: IoU, and the first image with its label, prediction and attention maps."""
    writer.add_scalar("mIoU", mean_iou(iou), step)
    for name, value in zip(val_set.names, iou.tolist(), strict=True):
        writer.add_scalar(f"IoU/{name}", value, step)
    writer.add_figure("segmentation", plot_segmentation(model, *val_set[0], val_set.names, val_set.colours), step)


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Joins the processes that torchrun has started, if it has, and yields the device of this one."""
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        yield torch.device("cuda" if cuda else "cpu")
        return
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=1))  # a download may take so long
    try:
        yield device
    finally:
        dist.destroy_process_group()


@contextmanager
def first_process_ahead() -> Iterator[bool]:
    """Lets the first process of every machine go ahead with what is inside, and yields whether this is one."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if dist.is_initialized() and not is_first:
        dist.barrier()
    try:
        yield is_first
    finally:  # also after an error: the others have it too, and say so, instead of waiting
        if dist.is_initialized() and is_first:
            dist.barrier()


def load_backbone(model: nn.Module, path: Path) -> None:
    """Loads a state_dict of torchvision's into the backbone. Raises ValueError if it does not fit."""
    state = {name: value for name, value in load_checkpoint(path).items() if not name.startswith("fc.")}
    try:
        model.backbone.load_state_dict(state)
    except RuntimeError:
        raise ValueError(f"{path} must hold the weights of the backbone: its names or shapes are others") from None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.emanet.train", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the run: checkpoints and TensorBoard's events")
    add_data_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet101", help="(default: %(default)s)")
    parser.add_argument(
        "--weights-backbone",
        default="DEFAULT",
        help="of the backbone: a file with its state_dict, DEFAULT for torchvision's (a download), or none",
    )
    parser.add_argument("--output-stride", type=int, choices=(8, 16), default=8, help="(default: %(default)s)")
    parser.add_argument("--stem-channels", type=int, help="of a deep stem; published: 128 (default: no such stem)")
    parser.add_argument(
        "--multi-grid",
        type=int,
        nargs="+",
        metavar="FACTOR",
        help="of the dilations of the last stage's blocks; published: 1 2 4 (default: all 1)",
    )
    parser.add_argument("--channels", type=int, default=512, help="of the attention unit (default: %(default)s)")
    parser.add_argument("--num-bases", type=int, default=64, help="K (default: %(default)s)")
    parser.add_argument("--stages", type=int, default=3, help="T (default: %(default)s)")
    parser.add_argument("--gradient", choices=("none", "last", "all"), default="none", help="(default: %(default)s)")
    parser.add_argument(
        "--crop",
        type=int,
        nargs=2,
        default=(513, 513),
        metavar=("HEIGHT", "WIDTH"),
        help="of the samples (default: 513 513)",
    )
    for setting in fields(Recipe):
        parser.add_argument(
            "--" + setting.name.replace("_", "-"),
            type=type(setting.default),
            choices=PRECISIONS if setting.name == "precision" else None,
            default=setting.default,
            help=f"{setting.metadata['help']} (default: %(default)s)",
        )
    args = parser.parse_args(arguments)
    try:
        recipe = Recipe(**{setting.name: getattr(args, setting.name) for setting in fields(Recipe)})
        network = {
            name: getattr(args, name)
            for name in ("backbone", "output_stride", "stem_channels", "channels", "num_bases", "stages", "gradient")
        }
        network["multi_grid"] = tuple(args.multi_grid) if args.multi_grid else None
        resumes = args.resume and (args.folder / "last.pt").exists()
        weights = "none" if resumes else args.weights_backbone
        with process_group() as device:
            with first_process_ahead() as is_first:
                args.download &= is_first  # the others find what it has downloaded
                train_set, val_set = (open_data(args, split) for split in ("train", "val"))
                network["num_classes"] = len(train_set.names)
                seed_everything(recipe.seed)
                model = emanet(**network, weights_backbone="DEFAULT" if weights == "DEFAULT" else None)
            if weights not in ("DEFAULT", "none"):
                load_backbone(model, Path(weights))
            history = fit(
                model, train_set, val_set, augmentation(args.crop), recipe, args.folder, device, args.resume, network
            )
    except (OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    if recipe.steps not in history:
        print(f"stopped; go on with --resume: {args.folder / 'last.pt'}")


if __name__ == "__main__":
    main()
