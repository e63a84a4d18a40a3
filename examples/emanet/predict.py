"""What a trained network sees in pictures: the classes over each, and the attention maps of its unit.

python -m examples.emanet.predict runs/camvid/best.pt photo.jpg more/*.png --output out/predictions
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision import tv_tensors
from tqdm import tqdm

from ema_attention import collect_attention_maps, plot_attention_maps
from examples._common.evaluation import segment
from examples._common.files import write_figure
from examples._common.picture_files import read_image
from examples._common.pictures import colour_classes, draw_class_legend
from examples._common.samples import Colours, normalisation
from examples.emanet.evaluate import PAPER_SCALES
from examples.emanet.published import load_network


def plot_overlay(image: Tensor, classes: Tensor, names: Sequence[str], colours: Colours) -> Figure:
    """Predicted classes (H, W) over their image (3, H, W), uint8, with the share of each."""
    height, width = classes.shape
    blend = (image.permute(1, 2, 0).float() + colour_classes(classes, colours).float()) / 2
    figure = Figure(figsize=(8, 8 * min(height / width, 2) + 0.8), layout="constrained")
    ax = figure.subplots()
    ax.imshow(blend.to(torch.uint8).numpy())
    ax.set(xticks=[], yticks=[])
    shares = {
        int(label): int(count) / classes.numel()
        for label, count in zip(*classes.unique(return_counts=True), strict=True)
    }
    order = sorted(shares, key=lambda label: -shares[label])
    labels = [f"{names[label]} {shares[label]:.1%}" for label in order]
    draw_class_legend(figure, labels, tuple(colours[label] for label in order), columns=6)
    return figure


@torch.no_grad()
def predict(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _, names, colours = load_network(args.checkpoint)
    model.to(device)
    stems = [path.stem for path in args.images]
    if twice := [stem for stem in stems if stems.count(stem) > 1]:
        raise ValueError(f"images must have names of their own; got {stems.count(twice[0])} called {twice[0]!r}")
    given = {path.resolve() for path in args.images}
    written = [args.output / f"{stem}_{kind}.png" for stem in stems for kind in ("classes", "attention")]
    if lost := next((path for path in written if path.resolve() in given), None):
        raise ValueError(f"{lost} is one of the images, and would be written over: give another --output")
    for path in tqdm(args.images, unit="image"):
        image = tv_tensors.Image(read_image(path))
        x = normalisation(image)[None].to(device)
        with collect_attention_maps(model) as maps:
            classes = model(x).argmax(1)[0].cpu()
        if args.multi_scale:
            classes = segment(model, x, PAPER_SCALES, flip=True).argmax(1)[0].cpu()
        overlay = plot_overlay(image, classes, names, colours)
        write_figure(overlay, args.output / f"{path.stem}_classes.png")
        write_figure(plot_attention_maps(image, maps["emau"][0].cpu()), args.output / f"{path.stem}_attention.png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.emanet.predict", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a network: that examples.emanet.train wrote, or published")
    parser.add_argument("images", type=Path, nargs="+", help="any that Pillow reads")
    parser.add_argument("--multi-scale", action="store_true", help=f"at the scales {PAPER_SCALES}, each mirrored too")
    parser.add_argument("--output", type=Path, default=Path("out/predictions"), help="folder (default: %(default)s)")
    args = parser.parse_args(arguments)
    try:
        predict(args)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    print(f"predictions and attention maps: {args.output}")


if __name__ == "__main__":
    main()
