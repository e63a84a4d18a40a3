"""Attention maps of a photograph without any training: features of a pretrained network, then EM on that one image.

python -m examples.attention_maps                 scikit-image's cat; needs no network
python -m examples.attention_maps photo.jpg --bases 8
python -m examples.attention_maps photo.jpg --backbone resnet50 --weights DEFAULT    downloads 98 MB, once

It needs ``pip install "ema-attention[examples]"``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from ema_attention import em_attention, plot_attention_maps
from examples._common.files import write_figure
from examples._common.photos import efficientnet_lite0, extract_features, farthest_positions, read_photo
from examples._common.samples import IMAGENET_MEAN, IMAGENET_STD
from examples._common.weights import load_weights, read_weights


def resnet50(weights: str) -> Callable[[Tensor], Tensor]:
    """The third stage of torchvision's ResNet-50: features with 1,024 channels of images (B, 3, H, W) from 0 to 255."""
    model = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    if weights == "DEFAULT":
        try:
            state = torchvision.models.ResNet50_Weights.DEFAULT.get_state_dict(progress=True, check_hash=True)
        except OSError as error:
            raise ValueError(f"cannot download the weights of resnet50: {error}") from error
    else:
        state = read_weights(Path(weights))
    load_weights(model, state, weights, "resnet50")
    stages = nn.Sequential(*list(model.children())[:-3])  # without layer4, the pooling and the classifier
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return lambda images: stages((images / 255 - mean) / std)


BACKBONES = {"efficientnet-lite0": efficientnet_lite0, "resnet50": resnet50}


def run(args: argparse.Namespace) -> None:
    started = time.perf_counter()

    def say(step: str) -> None:
        print(f"{time.perf_counter() - started:5.1f} s  {step}", flush=True)

    photo = read_photo(args.image, args.size)
    say(f"photograph: {photo.shape[1]}×{photo.shape[0]} pixels of {args.image or 'the cat of scikit-image'}")
    backbone = BACKBONES[args.backbone](args.weights)
    say(f"weights of {args.backbone}")
    x = extract_features(backbone, photo)
    say(f"features: {x.shape[1]} channels at {x.shape[2]}×{x.shape[3]} positions")
    mu = farthest_positions(x, args.bases)
    _, _, z = em_attention(F.normalize(x, dim=1), mu, args.stages, scale=args.scale)
    say(f"{args.stages} stages of EM with {args.bases} bases")
    write_figure(plot_attention_maps(photo, z[0]), args.output)
    say(f"picture: {args.output}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Attention maps of a photograph, without any training.")
    parser.add_argument("image", type=Path, nargs="?", help="any image Pillow reads (default: scikit-image's cat)")
    parser.add_argument("--bases", type=int, default=6, help="K (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=10.0, help="sharpness of the E-step (default: %(default)s)")
    parser.add_argument("--stages", type=int, default=15, help="EM stages (default: %(default)s)")
    parser.add_argument("--size", type=int, default=448, help="pixels of the longer side (default: %(default)s)")
    parser.add_argument("--backbone", choices=BACKBONES, default="efficientnet-lite0", help="(default: %(default)s)")
    parser.add_argument(
        "--weights",
        default="DEFAULT",
        help="of the backbone: a file with its state_dict, or DEFAULT, trained on ImageNet (for resnet50: a download)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("out/attention_maps.png"), help="the picture (default: %(default)s)"
    )
    try:
        run(parser.parse_args(argv))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
