"""How well a network segments: the IoU of every class over a data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision.transforms.v2.functional import horizontal_flip, resize
from tqdm import tqdm

from examples._common.processes import rank_and_ranks
from examples._common.samples import IGNORE, Normalised, Samples


def segment(model: nn.Module, image: Tensor, scales: Sequence[float] = (1.0,), flip: bool = False) -> Tensor:
    """The probabilities (B, classes, H, W) of images (B, 3, H, W): the mean over scales, and their mirror images."""
    height, width = image.shape[-2:]
    views = []
    for scale in scales:
        size = [max(1, round(side * scale)) for side in (height, width)]
        scaled = image if scale == 1 else resize(image, size, antialias=True)
        views.append(model(scaled).float().softmax(1))
        if flip:
            views.append(horizontal_flip(model(horizontal_flip(scaled)).float().softmax(1)))
    return torch.stack(
        [view if view.shape[-2:] == image.shape[-2:] else resize(view, [height, width]) for view in views]
    ).mean(0)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Samples,
    device: torch.device | str = "cpu",
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Tensor:
    """IoU of every class over a data set, from 0 to 1; NaN for a class that is neither there nor predicted.

    With several processes each takes its share of the data, and all return the same. Every module is left in the
    mode it was in.
    """
    rank, ranks = rank_and_ranks()
    share = Subset(Normalised(dataset), range(rank, len(dataset), ranks))
    metric = MulticlassJaccardIndex(len(dataset.names), "none", ignore_index=IGNORE, zero_division=float("nan"))
    metric = metric.to(device)
    with evaluation_mode(model):
        for image, mask in tqdm(DataLoader(share), "evaluating", unit="image", leave=False, disable=rank > 0 or None):
            metric.update(segment(model, image.to(device), scales, flip).argmax(1), mask.to(device))
    return metric.compute()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and every module's own mode again after it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def mean_iou(iou: Tensor | Sequence[float]) -> float:
    """The mean over the classes, from 0 to 1, without those that are neither there nor predicted."""
    return torch.as_tensor(iou).nanmean().item()
