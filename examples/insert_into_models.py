"""EMAUnit inserted into existing networks: 2D, 3D, tokens, 1D.

python -m examples.insert_into_models

Each function takes a network, puts a unit into it, and returns it. The network's own parameters keep their
names, so its pretrained weights fit before and after. With ``layer_scale=0`` the network computes the same as
before, until training changes the unit.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models import ResNet, resnet18
from torchvision.models.video import VideoResNet, r3d_18

from ema_attention import EMAUnit


def insert_into_resnet(model: ResNet | VideoResNet) -> nn.Module:
    """After the last stage but one of torchvision's ResNets, of images or of videos.

    The last stage leaves fewer positions than the unit has bases. The one before it has half of its channels, and ends
    with a ReLU, so the unit's own last ReLU changes nothing at the start.
    """
    model.layer3.append(EMAUnit(model.fc.in_features // 2, gradient="all", layer_scale=0))
    return model


def insert_into_vision_transformer(model: VisionTransformer) -> nn.Module:
    """Half-way up timm's vision transformer, over the patch tokens.

    After the last block it would have no effect: the classifier reads the class token alone.
    """
    unit = EMAUnit(model.embed_dim, gradient="all", layer_scale=0, final_relu=False, channel_dim=-1)
    blocks = list(model.blocks.named_children())
    blocks.insert(len(blocks) // 2, ("ema", PatchTokens(unit, model.num_prefix_tokens)))
    model.blocks = nn.Sequential(OrderedDict(blocks))  # by name: the other blocks keep their numbers
    return model


class PatchTokens(nn.Module):
    """Applies ``module`` to the patch tokens of (B, N, C); the class token and others in front stay the same."""

    def __init__(self, module: nn.Module, num_prefix_tokens: int) -> None:
        super().__init__()
        self.module = module
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, tokens: Tensor) -> Tensor:
        prefix, patches = tokens.tensor_split([self.num_prefix_tokens], dim=1)
        return torch.cat([prefix, self.module(patches)], dim=1)


def m5(num_classes: int = 10) -> nn.Sequential:
    """M5, a 1D network for raw waveforms (B, 1, L): Dai et al., ICASSP 2017, arXiv 1610.00087, table 1.

    Written here because neither torchvision nor timm has a 1D network.
    """
    features = nn.Sequential()
    in_channels = 1
    for out_channels, kernel_size, stride in ((128, 80, 4), (128, 3, 1), (256, 3, 1), (512, 3, 1)):
        features.extend(
            [
                nn.Conv1d(in_channels, out_channels, kernel_size, stride, kernel_size // 2),
                nn.BatchNorm1d(out_channels),
                nn.ReLU(inplace=True),
                nn.MaxPool1d(4),
            ]
        )
        in_channels = out_channels
    head = OrderedDict(
        features=features, pool=nn.AdaptiveAvgPool1d(1), flatten=nn.Flatten(), fc=nn.Linear(in_channels, num_classes)
    )
    return nn.Sequential(head)


def insert_into_m5(model: nn.Sequential) -> nn.Module:
    """After the features. They end with a ReLU and a maximum, so they are not negative either.

    Of two seconds at 16 kHz they have 31 positions.
    """
    model.features.append(EMAUnit(model.fc.in_features, num_bases=8, gradient="all", layer_scale=0))
    return model


class Insertion(NamedTuple):
    build: Callable[[], nn.Module]
    insert: Callable[..., nn.Module]
    input_shape: tuple[int, ...]


INSERTIONS = {
    "torchvision resnet18": Insertion(resnet18, insert_into_resnet, (1, 3, 224, 224)),
    "torchvision r3d_18": Insertion(r3d_18, insert_into_resnet, (1, 3, 16, 112, 112)),
    "timm vit_tiny_patch16_224": Insertion(
        lambda: timm.create_model("vit_tiny_patch16_224"), insert_into_vision_transformer, (1, 3, 224, 224)
    ),
    "M5": Insertion(m5, insert_into_m5, (1, 1, 32000)),
}


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser(
        prog="python -m examples.insert_into_models", description=__doc__.splitlines()[0]
    ).parse_args(arguments)
    row = "{:<27}{:<22}{:<19}{:>16}  {:>14}{:>14}"
    print(row.format("network", "input", "unit", "extra parameters", "max |output|", "max |change|"))
    for name, (build, insert, input_shape) in INSERTIONS.items():
        torch.manual_seed(0)
        model, x = build().eval(), torch.randn(input_shape)
        with torch.no_grad():
            before = model(x)
            after = insert(model).eval()(x)
        place, unit = next((place, module) for place, module in model.named_modules() if isinstance(module, EMAUnit))
        extra = sum(p.numel() for p in unit.parameters())
        output, change = (f"{value.abs().max():.3g}" for value in (before, after - before))
        print(row.format(name, str(input_shape), place, f"{extra:,}", output, change))


if __name__ == "__main__":
    main()
