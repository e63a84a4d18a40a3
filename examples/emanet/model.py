"""EMANet on torchvision's ResNet: Li et al., ICCV 2019, arXiv 1907.13426, section 4 and figure 2.

backbone → 3×3 conv, BN, ReLU → EMAU → 3×3 conv, BN, ReLU, dropout → 1×1 conv → bilinear upsampling.

The backbone is torchvision's ResNet with dilation in its last stages. The published one also has a deep stem and
a multi-grid: ``emanet("resnet101", stem_channels=128, multi_grid=(1, 2, 4))``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet, WeightsEnum, get_model
from torchvision.models.resnet import conv1x1, conv3x3

from ema_attention import EMAUnit, GradientMode

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101")
DILATED_STAGES = {8: ("layer3", "layer4"), 16: ("layer4",)}
"""The stages that keep their input's resolution, for each output stride."""


class EMANet(nn.Module):
    """Semantic segmentation with EM attention on the features of ``backbone``.

    The head's parts have their names from the published weights. Only the backbone's keys differ.

    Args:
        backbone: maps an image (B, 3, H, W) to features (B, in_channels, H/s, W/s).
        in_channels: of the features.
        num_classes: of the prediction.
        channels: of the attention unit; 512 and 256 are published.
        num_bases: K of the unit.
        stages: T of the unit.
        gradient: of the unit.
        layer_scale: of the unit.
        concat_input: one more 3×3 conv, BN, ReLU before the last convolution, on the features concatenated with
            the output of fc1, as in mmsegmentation.
    """

    align_corners = True
    """Of the upsampling. The models of mmsegmentation at 512×1024, not those at 769×769, have False."""

    def __init__(
        self,
        backbone: nn.Module,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 512,
        num_bases: int = 64,
        stages: int = 3,
        gradient: GradientMode = "none",
        layer_scale: float = 1.0,
        concat_input: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.fc0 = ConvNormReLU(in_channels, channels)
        self.emau = EMAUnit(channels, num_bases, stages, gradient=gradient, layer_scale=layer_scale)
        self.fc1 = nn.Sequential(ConvNormReLU(channels, 256), nn.Dropout2d(0.1))
        self.conv_cat = ConvNormReLU(in_channels + 256, 256) if concat_input else None
        self.fc2 = nn.Conv2d(256, num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """The logits (B, num_classes, H, W) of an image (B, 3, H, W)."""
        features = self.backbone(image)
        x = self.fc1(self.emau(self.fc0(features)))
        if self.conv_cat is not None:
            x = self.conv_cat(torch.cat([features, x], 1))
        return F.interpolate(self.fc2(x), size=image.shape[-2:], mode="bilinear", align_corners=self.align_corners)


class ConvNormReLU(nn.Sequential):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)


def emanet(
    backbone: str = "resnet101",
    num_classes: int = 21,
    *,
    output_stride: int = 8,
    channels: int = 512,
    num_bases: int = 64,
    stages: int = 3,
    gradient: GradientMode = "none",
    layer_scale: float = 1.0,
    weights_backbone: WeightsEnum | str | None = None,
    stem_channels: int | None = None,
    multi_grid: tuple[int, ...] | None = None,
    concat_input: bool = False,
) -> EMANet:
    """Builds an :class:`EMANet` on a ResNet of torchvision.

    Args:
        backbone: one of ``BACKBONES``.
        num_classes: of the prediction.
        output_stride: of the backbone's features, 8 or 16.
        channels: of the attention unit.
        num_bases: K of the unit.
        stages: T of the unit.
        gradient: of the unit.
        layer_scale: of the unit.
        weights_backbone: of the backbone, as torchvision takes them: None for random ones, ``"DEFAULT"``
            for its best (a download), which have no deep stem.
        stem_channels: of a deep stem; None for torchvision's 7×7 convolution. See :func:`deepen_stem`.
        multi_grid: the factors on the dilations of the last stage's blocks; None for 1.
        concat_input: see :class:`EMANet`.

    Raises:
        ValueError: for a backbone or an output stride that is not one of those, no classes or channels, weights with
            a deep stem, stem channels or a multi-grid that do not fit the backbone.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"backbone must be one of {BACKBONES}; got {backbone!r}")
    if min(num_classes, channels) < 1:
        raise ValueError(f"num_classes and channels must be at least 1; got {num_classes} and {channels}")
    if stem_channels is not None and weights_backbone is not None:
        raise ValueError(f"stem_channels must be None with torchvision's weights; got {stem_channels}")
    resnet = get_model(backbone, weights=weights_backbone)
    if stem_channels is not None:
        deepen_stem(resnet, stem_channels)
    features = resnet_features(resnet, output_stride, multi_grid)
    return EMANet(
        features,
        resnet.fc.in_features,
        num_classes,
        channels=channels,
        num_bases=num_bases,
        stages=stages,
        gradient=gradient,
        layer_scale=layer_scale,
        concat_input=concat_input,
    )


def deepen_stem(resnet: ResNet, channels: int) -> None:
    """Replaces a torchvision ResNet's 7×7 convolution by three 3×3, to half the channels, again half, and all.

    The published backbone has 128 channels there, mmsegmentation's ResNetV1c 64. The names are those of timm's
    ResNets with a deep stem.

    Raises:
        ValueError: for channels that are odd, or that the first block cannot take.
    """
    block = resnet.layer1[0]
    if channels < 2 or channels % 2:
        raise ValueError(f"stem_channels must be even and at least 2; got {channels}")
    if channels != block.conv1.in_channels and block.downsample is None:
        raise ValueError(f"stem_channels must be {block.conv1.in_channels} for ResNet-18 and 34; got {channels}")
    half = channels // 2
    resnet.conv1 = nn.Sequential(
        conv3x3(3, half, stride=2),
        nn.BatchNorm2d(half),
        nn.ReLU(inplace=True),
        conv3x3(half, half),
        nn.BatchNorm2d(half),
        nn.ReLU(inplace=True),
        conv3x3(half, channels),
    )
    resnet.bn1 = nn.BatchNorm2d(channels)
    new = [resnet.conv1[0], resnet.conv1[3], resnet.conv1[6]]
    if channels != block.conv1.in_channels:
        block.conv1 = conv1x1(channels, block.conv1.out_channels)
        block.downsample[0] = conv1x1(channels, block.downsample[0].out_channels)
        new += [block.conv1, block.downsample[0]]
    for conv in new:
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's


def dilate(stages: Iterable[nn.Module]) -> None:
    """Takes the strides from stages of 1×1 and 3×3 convolutions, whose outputs then have the resolution of the input.

    A convolution that loses its stride s has its old outputs at every s-th position. So the convolutions after it get s
    times their dilation. This is torchvision's ``replace_stride_with_dilation``, which ResNet-18 and 34 do not have.
    """
    dilation = 1
    for stage in stages:
        for conv in stage.modules():
            if not isinstance(conv, nn.Conv2d):
                continue
            if conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (dilation, dilation)
                dilation *= conv.stride[0]
            conv.stride = (1, 1)


def resnet_features(resnet: ResNet, output_stride: int, multi_grid: tuple[int, ...] | None = None) -> nn.Sequential:
    """A torchvision ResNet up to its last stage, at the given output stride, under the names it has there.

    The convolutions are changed in place. The multi-grid multiplies the dilations of layer4's blocks: at output stride
    8 those of ResNet-101 are 2, 4, 4, and a multi-grid 1, 2, 4 makes them 2, 8, 16.

    Raises:
        ValueError: for another output stride, or a multi-grid that does not fit layer4.
    """
    if output_stride not in DILATED_STAGES:
        raise ValueError(f"output_stride must be one of {tuple(DILATED_STAGES)}; got {output_stride}")
    features = nn.Sequential(OrderedDict((k, v) for k, v in resnet.named_children() if k not in ("avgpool", "fc")))
    dilate(map(features.get_submodule, DILATED_STAGES[output_stride]))
    if multi_grid is not None:
        if len(multi_grid) != len(features.layer4) or min(multi_grid) < 1:
            raise ValueError(
                f"multi_grid must have a factor of at least 1 for each of layer4's {len(features.layer4)} blocks; "
                f"got {multi_grid}"
            )
        for factor, block in zip(multi_grid, features.layer4, strict=True):
            for conv in block.modules():
                if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = (factor * conv.dilation[0], factor * conv.dilation[1])
    return features
