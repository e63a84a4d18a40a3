"""How well a trained network segments: IoU per class and their mean, at one scale, or as the paper at six with flips.

python -m examples.emanet.evaluate runs/camvid/best.pt --data camvid --root CAMVID --split test
python -m examples.emanet.evaluate runs/voc/best.pt --data voc --root VOC --multi-scale
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from examples._common.evaluation import evaluate, mean_iou
from examples.emanet.data import add_data_arguments, open_data
from examples.emanet.published import load_network

PAPER_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


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
