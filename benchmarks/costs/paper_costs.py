"""The paper's cost table, computed: what each head adds to torchvision's ResNet-101 at 513×513, output stride 8.

Nothing is computed: operators are counted on tensors that have a shape and no values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import resnet101
from torchvision.models.segmentation.deeplabv3 import ASPP, DeepLabHead

from benchmarks.measure import macs, parameters
from ema_attention import EMAUnit
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
    network = resnet101(replace_stride_with_dilation=[False, True, True])
    if published_stem:
        network.conv1 = nn.Sequential(
            *(nn.Conv2d(3, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
            nn.Conv2d(64, 128, 3, 1, 1, bias=False),
        )
        network.bn1 = nn.BatchNorm2d(128)
        network.layer1[0].conv1 = nn.Conv2d(128, 64, 1, bias=False)
        network.layer1[0].downsample[0] = nn.Conv2d(128, 256, 1, bias=False)
    return nn.Sequential(*list(network.children())[:-2])


def reduction(channels: int, out: int) -> nn.Sequential:
    """3×3 convolution, BN, ReLU."""
    conv = nn.Conv2d(channels, out, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())


def count(side: int = 513) -> list[dict]:
    """Rows of ``{"name", "macs", "parameters", "published", "note"}``: the backbones, then what each head adds."""
    with torch.device("meta"):
        backbones = {"ResNet-101": backbone(), "ResNet-101, published stem": backbone(published_stem=True)}
        heads: dict[str, nn.Module] = {
            "DeepLabV3, ASPP alone": ASPP(2048, [12, 24, 36]),
            "DeepLabV3, torchvision's head": DeepLabHead(2048, CLASSES),
        }
    for width in (256, 512):
        heads[f"EMANet ({width})"] = nn.Sequential(reduction(2048, width), PublishedEMAU(width))
        heads[f"EMANet ({width}), EMAUnit"] = nn.Sequential(reduction(2048, width), EMAUnit(width))
    heads["EMANet (512), whole head"] = nn.Sequential(
        reduction(2048, 512), PublishedEMAU(512), reduction(512, 256), nn.Conv2d(256, CLASSES, 1)
    )
    features = torch.empty(1, 2048, -(-side // 8), -(-side // 8), device="meta")
    image = torch.empty(1, 3, side, side, device="meta")
    rows = [(name, module, image) for name, module in backbones.items()]
    rows += [(name, head, features) for name, head in heads.items()]
    return [
        {
            "name": name,
            "macs": _macs(module.eval(), x),
            "parameters": parameters(module),
            "published": PUBLISHED.get(name.split(",")[0]),
            "note": NOTES[name],
        }
        for name, module, x in rows
    ]


def _macs(module: nn.Module, x: torch.Tensor) -> int:
    if next(module.parameters()).device.type == "meta":
        return macs(module, x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return macs(module, torch.empty(x.shape))
