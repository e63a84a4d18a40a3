"""The paper's cost table, computed: what each head adds to torchvision's ResNet-101 at 513×513, output stride 8.

Nothing is computed: operators are counted on tensors that have a shape and no values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torchvision.models import resnet101
from torchvision.models.segmentation.deeplabv3 import ASPP, DeepLabHead

from benchmarks.measure import macs, parameters
from ema_attention import EMAUnit
from examples.emanet.model import ConvNormReLU, deepen_stem, resnet_features
from tests.plain import PublishedEMAU

CLASSES = 21  # PASCAL VOC


class Published(NamedTuple):
    macs: float
    parameters: float


PUBLISHED = {
    "ResNet-101": Published(190.6e9, 42.6e6),
    "DeepLabV3": Published(63.4e9, 15.5e6),
    "EMANet (256)": Published(21.1e9, 4.87e6),
    "EMANet (512)": Published(43.1e9, 10.0e6),
}
"""Li et al., ICCV 2019, table 2. The paper writes FLOPs for what are multiply-accumulates; heads are differences."""

NOTES = {
    "ResNet-101": "torchvision's stem is one 7×7 convolution",
    "ResNet-101, published stem": "three 3×3 convolutions, to 128 channels. 0.7 GMAC are left: norms, activations "
    "and pooling are not counted here",
    "DeepLabV3, ASPP alone": "what the paper counts as DeepLabV3",
    "DeepLabV3, torchvision's head": "ASPP, then a 3×3 convolution 256→256 and the classifier, which the paper leaves "
    "out for every head",
    "EMANet (256)": "3×3 reduction and the unit as published; neither what follows it nor the classifier",
    "EMANet (512)": "as above",
    "EMANet (256), EMAUnit": "the projection folded into the bases: the same function, C²N fewer",
    "EMANet (512), EMAUnit": "as above",
    "EMANet (512), whole head": "and the 3×3 convolution 512→256 and the classifier",
}


def backbone(published_stem: bool = False) -> nn.Sequential:
    """ResNet-101 at output stride 8, without pooling and classifier; torchvision's stem or the published one."""
    network = resnet101()
    if published_stem:
        deepen_stem(network, 128)
    return resnet_features(network, output_stride=8)


def count(side: int = 513) -> list[dict]:
    """Rows of ``{"name", "macs", "parameters", "published", "note"}``: the backbones, then what each head adds."""
    with torch.device("meta"):
        backbones = {"ResNet-101": backbone(), "ResNet-101, published stem": backbone(published_stem=True)}
        heads: dict[str, nn.Module] = {
            "DeepLabV3, ASPP alone": ASPP(2048, [12, 24, 36]),
            "DeepLabV3, torchvision's head": DeepLabHead(2048, CLASSES),
        }
        for width in (256, 512):
            heads[f"EMANet ({width})"] = nn.Sequential(ConvNormReLU(2048, width), PublishedEMAU(width))
            heads[f"EMANet ({width}), EMAUnit"] = nn.Sequential(ConvNormReLU(2048, width), EMAUnit(width))
        heads["EMANet (512), whole head"] = nn.Sequential(
            ConvNormReLU(2048, 512), PublishedEMAU(512), ConvNormReLU(512, 256), nn.Conv2d(256, CLASSES, 1)
        )
        image, features = torch.empty(1, 3, side, side), torch.empty(1, 2048, -(-side // 8), -(-side // 8))
    rows = [(name, module, image) for name, module in backbones.items()]
    rows += [(name, head, features) for name, head in heads.items()]
    return [
        {
            "name": name,
            "macs": macs(module.eval(), x),
            "parameters": parameters(module),
            "published": PUBLISHED.get(name.split(",")[0]),
            "note": NOTES[name],
        }
        for name, module, x in rows
    ]
