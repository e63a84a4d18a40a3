"""EMANet on torchvision's ResNet: Li et al., ICCV 2019, arXiv 1907.13426, section 4 and figure 2.

backbone → 3×3 conv, BN, ReLU → EMAU → 3×3 conv, BN, ReLU, dropout → 1×1 conv → bilinear upsampling.

The backbone is torchvision's ResNet with dilation in its last stages; the published one has a stem of
three 3×3 convolutions instead of one 7×7, and dilates the last stage by a multi-grid.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model

from ema_attention import EMAUnit

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101")
DILATED_STAGES = {8: ("layer3", "layer4"), 16: ("layer4",)}
"""The stages that keep their input's resolution, for each output stride."""


class EMANet(nn.Module):
    """Semantic segmentation with EM attention on the features of ``backbone``.

    The head's parts are called what the published weights call them: everything but the backbone's keys
    is the same.

    Args:
        backbone: maps an image (B, 3, H, W) to features (B, in_channels, H/s, W/s).
        in_channels: of the features.
        num_classes: of the prediction.
        channels: of the attention unit; 512 and 256 are published.
        num_bases: K of the unit.
        stages: T of the unit.
    """

    def __init__(
        self,
        backbone: nn.Module,
        in_channels: int,
        num_classes: int,
        channels: int = 512,
        num_bases: int = 64,
        stages: int = 3,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.fc0 = ConvNormReLU(in_channels, channels)
        self.emau = EMAUnit(channels, num_bases, stages)
        self.fc1 = nn.Sequential(ConvNormReLU(channels, 256), nn.Dropout2d(0.1))
        self.fc2 = nn.Conv2d(256, num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """The logits (B, num_classes, H, W) of an image (B, 3, H, W)."""
        x = self.fc0(self.backbone(image))
        x = self.fc2(self.fc1(self.emau(x)))
        return F.interpolate(x, size=image.shape[-2:], mode="bilinear", align_corners=True)


class ConvNormReLU(nn.Sequential):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)


def emanet(
    backbone: str = "resnet101",
    num_classes: int = 21,
    output_stride: int = 8,
    channels: int = 512,
    num_bases: int = 64,
    stages: int = 3,
    weights_backbone: WeightsEnum | str | None = None,
) -> EMANet:
    """Builds an :class:`EMANet` on a ResNet of torchvision.

    Args:
        backbone: one of ``BACKBONES``.
        num_classes: of the prediction.
        output_stride: of the backbone's features, 8 or 16.
        channels: of the attention unit.
        num_bases: K of the unit.
        stages: T of the unit.
        weights_backbone: of the backbone, as torchvision takes them: None for random ones, ``"DEFAULT"``
            for its best (a download).

    Raises:
        ValueError: for a backbone or an output stride that is not one of those.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"backbone must be one of {BACKBONES}; got {backbone!r}")
    resnet = get_model(backbone, weights=weights_backbone)
    features = resnet_features(resnet, output_stride)
    return EMANet(features, resnet.fc.in_features, num_classes, channels, num_bases, stages)


def resnet_features(resnet: nn.Module, output_stride: int) -> nn.Sequential:
    """A torchvision ResNet up to its last stage, at the given output stride, under the names it has there.

    The convolutions are changed in place. One that loses its stride s computes its old outputs at every
    s-th position, so those that follow step s times as wide: torchvision's own
    ``replace_stride_with_dilation``, which ResNet-18 and 34 do not have.
    """
    if output_stride not in DILATED_STAGES:
        raise ValueError(f"output_stride must be one of {tuple(DILATED_STAGES)}; got {output_stride}")
    features = nn.Sequential(OrderedDict((k, v) for k, v in resnet.named_children() if k not in ("avgpool", "fc")))
    dilation = 1
    for stage in DILATED_STAGES[output_stride]:
        for conv in features.get_submodule(stage).modules():
            if not isinstance(conv, nn.Conv2d):
                continue
            if conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (dilation, dilation)
                dilation *= conv.stride[0]
            conv.stride = (1, 1)
    return features
