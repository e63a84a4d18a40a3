"""Trains EMANet by the recipe of Li et al., ICCV 2019, section 4.1, or another, on one CPU, one GPU or many.

python -m examples.emanet.train runs/camvid --data camvid --root CAMVID
torchrun --nproc-per-node 4 -m examples.emanet.train runs/voc --data voc --root VOC --precision bfloat16
python -m examples.emanet.train runs/mine --data folder --root MINE --classes MINE/classes.txt
python -m examples.emanet.train runs/camvid --data camvid --root CAMVID --resume     goes on where it stopped

Ctrl-C finishes the current step and writes the checkpoint ``last.pt``, from which ``--resume`` goes on. ``best.pt`` is
the network with the best mIoU on the validation set. TensorBoard shows the run: ``tensorboard --logdir runs``.

This file holds the command. The training step and its loop are in ``examples/_common/training.py``.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from torch import nn

from ema_attention import GradientMode
from examples._common.processes import failing_together, first_process_ahead, process_group
from examples._common.recipe import PRECISIONS, Recipe
from examples._common.samples import seed_everything
from examples._common.training import fit
from examples._common.weights import load_weights, read_weights
from examples.emanet.data import add_data_arguments, augmentation, open_data
from examples.emanet.model import BACKBONES, EMANet, emanet


def load_backbone(model: nn.Module, path: Path) -> None:
    """Loads a state_dict of torchvision's into the backbone. Raises ValueError if it does not fit."""
    state = {name: value for name, value in read_weights(path).items() if not name.startswith("fc.")}
    load_weights(model.backbone, state, path, "the backbone")


def build(network: dict[str, Any], weights: str) -> EMANet:
    """The network. Raises ValueError if its backbone's weights are torchvision's and cannot be downloaded."""
    try:
        return emanet(**network, weights_backbone="DEFAULT" if weights == "DEFAULT" else None)
    except OSError as error:
        raise ValueError(
            f"cannot download the weights of {network['backbone']} ({error}): give a file of them with "
            "--weights-backbone FILE, or --weights-backbone none for random ones"
        ) from None


def train(args: argparse.Namespace) -> None:
    recipe = Recipe(**{setting.name: getattr(args, setting.name) for setting in fields(Recipe)})
    network = {
        name: getattr(args, name)
        for name in (
            "backbone",
            "output_stride",
            "stem_channels",
            "channels",
            "num_bases",
            "stages",
            "gradient",
            "layer_scale",
        )
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
            model = build(network, weights)
            if is_first:
                print(f"{len(train_set)} images to train on, {len(val_set)} for validation")
        with failing_together():
            if is_first and not resumes:
                train_set.check("the images to train on")
                val_set.check("those for validation")
        if weights not in ("DEFAULT", "none"):
            load_backbone(model, Path(weights))
        transform = augmentation(args.crop)
        history = fit(model, train_set, val_set, transform, recipe, args.folder, device, args.resume, network)
    if is_first and recipe.steps not in history:
        print(f"stopped; go on with --resume: {args.folder / 'last.pt'}")


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
    parser.add_argument(
        "--gradient", choices=get_args(GradientMode), default="none", help="of the unit (default: %(default)s)"
    )
    parser.add_argument("--layer-scale", type=float, default=1.0, help="of the unit (default: %(default)s)")
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
        train(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
