"""How well a trained network segments: IoU per class and their mean, at one scale, or as the paper at six with flips.

python -m examples.emanet.evaluate runs/camvid/best.pt --data camvid --root CAMVID --split test
python -m examples.emanet.evaluate runs/voc/best.pt --data voc --root VOC --multi-scale
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision.transforms.v2.functional import horizontal_flip, resize
from tqdm import tqdm

from examples.emanet.data import IGNORE, Normalised, Segmentation, add_data_arguments, open_data
from examples.emanet.published import load_network

PAPER_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


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
    dataset: Segmentation,
    device: torch.device | str = "cpu",
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Tensor:
    """IoU of every class over a data set, from 0 to 1; NaN for a class that is neither there nor predicted.

    With several processes each takes its share of the data, and all return the same. Every module is left in the
    mode it was in.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
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


def iou_table(names: Sequence[str], iou: Tensor) -> str:
    """The IoU of every class in percent, and their mean, a line each."""
    width = max(len(name) for name in names)
    rows = [*zip(names, iou.tolist(), strict=True), ("mean", mean_iou(iou))]
    return "\n".join(f"{name:<{width}} {100 * value:6.2f}" for name, value in rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.emanet.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a network: that examples.emanet.train wrote, or published")
    add_data_arguments(parser)
    parser.add_argument("--split", default="val", help="of the data (default: %(default)s)")
    parser.add_argument("--multi-scale", action="store_true", help=f"at the scales {PAPER_SCALES}, each mirrored too")
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model, _, names, _ = load_network(args.checkpoint)
        dataset = open_data(args, args.split)
        if names != dataset.names:
            raise ValueError(f"{args.checkpoint} must be of a network for the classes {dataset.names}; got {names}")
        iou = evaluate(
            model.to(device), dataset, device, PAPER_SCALES if args.multi_scale else (1.0,), args.multi_scale
        )
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    print(iou_table(dataset.names, iou))


if __name__ == "__main__":
    main()
