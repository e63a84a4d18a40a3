"""EMANet's forward pass on a photograph: shapes, parameters, cost and time of its parts.

python -m examples.emanet.forward [IMAGE]
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import skimage.data
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import normalize, to_tensor

from ema_attention import collect_attention_maps
from examples._common.picture_files import read_image
from examples._common.samples import IMAGENET_MEAN, IMAGENET_STD
from examples.emanet.model import emanet

PARTS = {"backbone": ("backbone",), "reduction": ("fc0",), "EMA unit": ("emau",), "head": ("fc1", "fc2")}
LONGER_SIDE = 513  # the size of the paper's cost table


def load_image(path: Path) -> Tensor:
    """A photograph (1, 3, H, W) as torchvision's backbones expect it, at most ``LONGER_SIDE`` on its longer side."""
    image = read_image(path)
    image.thumbnail((LONGER_SIDE, LONGER_SIDE))
    return normalize(to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)[None]


def multiply_accumulates(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Multiply-accumulates of each direct child of ``model`` in a forward pass on x, by name; nothing is computed."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).to("meta")(x.to("meta"))
    counts = counter.get_flop_counts()
    return {name: sum(counts[f"{type(model).__name__}.{name}"].values()) // 2 for name, _ in model.named_children()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.emanet.forward", description=__doc__.splitlines()[0])
    parser.add_argument(
        "image",
        nargs="?",
        type=Path,
        default=Path(skimage.data.__file__).with_name("chelsea.png"),
        help=f"scaled down to {LONGER_SIDE} pixels on the longer side; default: scikit-image's photograph of a cat",
    )
    path = parser.parse_args(arguments).image
    try:
        image = load_image(path)
    except ValueError as error:
        parser.exit(2, f"{error}\n")

    torch.manual_seed(0)
    model = emanet("resnet101", num_classes=21, output_stride=8).eval()
    print("EMANet, ResNet-101, output stride 8, 21 classes")
    print("Weights are RANDOM: shapes, cost and time are real, the prediction means nothing.\n", flush=True)
    macs = multiply_accumulates(model, image)
    with torch.no_grad(), collect_attention_maps(model) as maps:
        start = time.perf_counter()
        logits = model(image)
        seconds = time.perf_counter() - start

    print(f"input           {tuple(image.shape)}  {path.name}")
    print(f"output          {tuple(logits.shape)}  logits")
    for name, z in maps.items():
        print(f"attention maps  {tuple(z.shape)}  of {name}")
    print(f"time            {seconds:.2f} s on the CPU, {torch.get_num_threads()} thread(s), one pass\n")
    print(f"{'part':<12}{'parameters':>12}{'GMAC':>8}")
    for part, children in PARTS.items():
        parameters = sum(p.numel() for child in children for p in model.get_submodule(child).parameters())
        print(f"{part:<12}{parameters / 1e6:>10.2f} M{sum(macs[child] for child in children) / 1e9:>8.2f}")


if __name__ == "__main__":
    main()
