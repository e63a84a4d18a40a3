"""A task that needs global context: find the digits that equal the key, on a canvas wider than the network sees.

A scene holds eight real handwritten digits (scikit-learn's). One of them, the key, is on a blue cell. The label is the
pixels of the digits of the key's class. Which digit a pixel belongs to is seen near it; whether that is the key's class
is seen only at the key.

python -m examples.digit_scenes    a network without the unit, and with it: two minutes on 2 cores
python -m examples.digit_scenes --gradient none --layer-scale 1    with the unit as published
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.ops import Conv2dNormActivation
from torchvision.tv_tensors import Image, Mask

from ema_attention import EMAUnit, GradientMode
from examples._common.evaluation import evaluate
from examples._common.files import write_figure
from examples._common.recipe import Recipe
from examples._common.samples import normalisation, seed_everything
from examples._common.training import fit

SPLITS = {"train": slice(0, 1000), "val": slice(1000, 1397), "test": slice(1397, 1797)}
"""The digits of each split, in one fixed permutation of all."""
GRID, CELL, DIGIT = 4, 16, 12  # cells a side of the canvas; pixels a side of a cell and of a digit
SIZE = GRID * CELL
DIGITS = 8
MATCHES = (2, 3, 4)
"""How many digits of a scene may be wanted."""
TEST_SCENES, SHOWN = 400, 6
THRESHOLD = 0.45  # brighter is stroke; no multiple of 1/576, as the interpolated intensities are
WHITE, KEY_CELL = 255, (0, 0, 160)


class DigitScenes(Dataset[tuple[Image, Mask]]):
    """Scenes of handwritten digits, with the pixels of those that equal the key.

    Eight digits stand in different cells of a 4×4 grid, white on black, each at random inside its cell. The cell of
    one, the key, is blue. 2, 3 or 4 of the others are of the key's class, and the rest of other classes.

    Scene i depends on the split and on i alone. No digit occurs in two splits.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``: drawn from 1,000, 397 or 400 digits.
        length: number of scenes.
        is_marked: whether the key's cell is blue. If it is not, a network can only guess: the key's class is often
            the most frequent one.

    Returns:
        Of each index from 0 to length − 1, the image (3, 64, 64), uint8, and the label (64, 64), int64: 1 on the
        strokes of the key's class, the key's among them, and 0 elsewhere.

    Raises:
        ValueError, TypeError: for a split or a length that is not one of those.

    Example:
        >>> image, label = DigitScenes("train", 1000)[0]
        >>> image.shape, label.unique()
        (torch.Size([3, 64, 64]), tensor([0, 1]))
    """

    names = ("background", "same digit as the key")
    wanted = 1
    """The label of the digits that are to be found."""
    colours = ((0, 0, 0), (86, 180, 233))
    """Okabe and Ito's, of each name."""

    def __init__(self, split: str, length: int, is_marked: bool = True) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {tuple(SPLITS)}; got {split!r}")
        if isinstance(length, bool) or not isinstance(length, int):
            raise TypeError(f"length must be an int; got {type(length).__name__}")
        if length < 1:
            raise ValueError(f"length must be at least 1; got {length}")
        self.split = split
        self.length = length
        self.is_marked = is_marked
        self.digits, self.classes = (values[SPLITS[split]] for values in _shuffled_digits())

    def __len__(self) -> int:
        return self.length

    def fingerprint(self) -> str:
        """What all scenes depend on."""
        return f"{self.length} scenes of {self.split}, the key {'' if self.is_marked else 'not '}marked"

    def __getitem__(self, index: int) -> tuple[Image, Mask]:
        if not 0 <= index < self.length:
            raise IndexError(f"index must be from 0 to {self.length - 1}; got {index}")
        random = np.random.default_rng([list(SPLITS).index(self.split), index])
        key_class = random.integers(10)
        matches = random.choice(MATCHES)
        same = random.choice(np.flatnonzero(self.classes == key_class), matches + 1, replace=False)
        other = random.choice(np.flatnonzero(self.classes != key_class), DIGITS - matches - 1, replace=False)
        cells = random.choice(GRID**2, DIGITS, replace=False)
        shifts = random.integers(CELL - DIGIT + 1, size=(DIGITS, 2))

        image = np.zeros((SIZE, SIZE, 3), np.float32)
        label = np.zeros((SIZE, SIZE), np.int64)
        for place, digit in enumerate((*same, *other)):  # the key is the first
            corner = CELL * np.array(divmod(cells[place], GRID))
            if place == 0 and self.is_marked:
                image[_square(corner, CELL)] = KEY_CELL
            square = _square(corner + shifts[place], DIGIT)
            strokes = self.digits[digit]
            image[square] = np.maximum(image[square], WHITE * strokes[..., None])
            if place <= matches:
                label[square] = strokes > THRESHOLD
        return Image(torch.from_numpy(image.round().astype(np.uint8)).permute(2, 0, 1)), Mask(torch.from_numpy(label))


@cache
def _shuffled_digits() -> tuple[np.ndarray, np.ndarray]:
    """All digits (1797, 12, 12), from 0 to 1, and their classes (1797,), in the order that is split."""
    digits, classes = load_digits(return_X_y=True)
    digits = torch.from_numpy(digits).float().view(-1, 1, 8, 8) / 16
    digits = F.interpolate(digits, (DIGIT, DIGIT), mode="bilinear")[:, 0].numpy()
    order = np.random.default_rng(0).permutation(len(digits))
    return digits[order], classes[order]


def _square(corner: np.ndarray, side: int) -> tuple[slice, slice]:
    row, column = corner
    return slice(row, row + side), slice(column, column + side)


class ShortSightedNet(nn.Module):
    """Five 3×3 convolutions, a block, and a head of one more and a 1×1 convolution to the logits of every pixel.

    Without a block, no logit depends on a pixel more than 22 rows or columns away. A 3×3 convolution widens the
    receptive field by twice the stride of its input. The strides are 1, 2, 4, 4, 4 and 4 here, which gives 39 pixels.

    Args:
        make_block: makes a block for a number of channels; ``nn.Identity`` for none. It maps (B, 48, H/4, W/4) to
            the same shape.

    Example:
        >>> ShortSightedNet(nn.Identity)(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 2, 64, 64])
    """

    channels = 48

    def __init__(self, make_block: Callable[[int], nn.Module]) -> None:
        super().__init__()
        channels = self.channels
        self.features = nn.Sequential(
            Conv2dNormActivation(3, channels, stride=2),
            Conv2dNormActivation(channels, channels, stride=2),
            *(Conv2dNormActivation(channels, channels) for _ in range(3)),
        )
        self.block = make_block(channels)
        self.head = nn.Sequential(
            Conv2dNormActivation(channels, channels),
            nn.Conv2d(channels, len(DigitScenes.names) * 4**2, 1),
            nn.PixelShuffle(4),
        )

    def forward(self, image: Tensor) -> Tensor:
        """The logits (B, 2, H, W) of an image (B, 3, H, W); H and W are multiples of 4."""
        return self.head(self.block(self.features(image)))


def plot_scenes(images: Tensor, labels: Tensor, predictions: dict[str, Tensor] | None = None) -> Figure:
    """Draws scenes side by side: the images (B, 3, H, W), and below them labels and named predictions (B, H, W)."""
    rows = {"image": images.movedim(1, -1), "label": _colour(labels)}
    rows |= {name: _colour(prediction) for name, prediction in (predictions or {}).items()}
    figure = Figure((max(1.6 * len(images), 6), 1.6 * len(rows) + 0.3), layout="constrained")  # 6 for the legend
    axes = figure.subplots(len(rows), len(images), squeeze=False)
    for row, (name, pictures) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(name)
        for ax, picture in zip(row, pictures, strict=True):
            ax.imshow(picture.cpu().numpy(), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
    named = zip(DigitScenes.names, DigitScenes.colours, strict=True)
    patches = [Patch(color=np.divide(colour, 255), label=name) for name, colour in named]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    return figure


def _colour(labels: Tensor) -> Tensor:
    """The labels (B, H, W) as colours (B, H, W, 3)."""
    return torch.tensor(DigitScenes.colours, dtype=torch.uint8)[labels.cpu().long()]


def build(block: Callable[[int], nn.Module], seed: int) -> ShortSightedNet:
    seed_everything(seed)
    return ShortSightedNet(block)


def learn(net: ShortSightedNet, args: argparse.Namespace, folder: Path) -> tuple[Tensor, float] | None:
    """Trains a network into a folder.

    Returns:
        What it predicts for the first scenes of the test set, (SHOWN, 64, 64), and the IoU of the wanted digits in that
        set; nothing after Ctrl-C.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))  # two networks train at a time
    try:
        recipe = Recipe(args.steps, 16, lr=0.4, norm_momentum=0.1, seed=args.seed, evaluate_every=200)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        history = fit(net, DigitScenes("train", 20_000), DigitScenes("val", 100), normalisation, recipe, folder, device)
        if args.steps not in history:
            return None
        _, iou = evaluate(net, DigitScenes("test", TEST_SCENES), device).tolist()
        images = torch.stack([image for image, _ in DigitScenes("test", SHOWN)])
        with torch.no_grad():
            return net.eval()(normalisation(Image(images)).to(device)).argmax(1).cpu(), iou
    finally:
        torch.set_num_threads(threads)


def compare(args: argparse.Namespace) -> None:
    """Trains the network with the unit and, in another process, without; and draws what both predict."""
    unit = partial(EMAUnit, gradient=args.gradient, layer_scale=args.layer_scale)
    without, with_unit = build(nn.Identity, args.seed), build(unit, args.seed)
    folder = next(run for i in count() if not (run := args.output / f"run-{i}").exists())
    print("two networks train at a time, one without the unit; the progress is that of the one with it")
    with ProcessPoolExecutor(1, get_context("spawn"), _be_silent) as other:
        learned_without = other.submit(learn, without, args, folder / "without-the-unit")
        learned = {"with the unit": learn(with_unit, args, folder / "with-the-unit")}
        learned = {"without the unit": learned_without.result()} | learned
    if None in learned.values():
        return
    predictions = {f"{name}:\nIoU {iou:.0%}": prediction for name, (prediction, iou) in learned.items()}
    images, labels = (torch.stack(values) for values in zip(*DigitScenes("test", SHOWN), strict=True))
    write_figure(plot_scenes(images, labels, predictions), folder / "test_scenes.png")
    print(f"IoU of the wanted digits, on {TEST_SCENES} scenes with digits that no network has seen:")
    for name, (_, iou) in learned.items():
        print(f"  {name:18}{iou:6.1%}")
    print(f"both, side by side: {folder / 'test_scenes.png'}")


def _be_silent() -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.digit_scenes", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--gradient", choices=get_args(GradientMode), default="all", help="of the unit (default: %(default)s)"
    )
    parser.add_argument("--layer-scale", type=float, default=0.25, help="of the unit (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="of 16 scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("out/digit_scenes"), help="folder (default: %(default)s)")
    args = parser.parse_args(arguments)
    try:
        compare(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
