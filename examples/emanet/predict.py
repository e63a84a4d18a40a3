"""What a trained network sees in pictures: the classes over each, and the attention maps of its unit.

python -m examples.emanet.predict runs/camvid/best.pt photo.jpg more/*.png --output out/predictions
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torchvision import tv_tensors
from tqdm import tqdm

from ema_attention import collect_attention_maps, plot_attention_maps
from examples.attention_maps import write_figure
from examples.emanet.data import normalisation, read_picture
from examples.emanet.evaluate import PAPER_SCALES, segment
from examples.emanet.pictures import plot_overlay
from examples.emanet.published import load_network


@torch.no_grad()
def predict(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _, names, colours = load_network(args.checkpoint)
    model.to(device)
    stems = [path.stem for path in args.images]
    if twice := [stem for stem in stems if stems.count(stem) > 1]:
        raise ValueError(f"images must have names of their own; got {stems.count(twice[0])} called {twice[0]!r}")
    for path in tqdm(args.images, unit="image"):
        image = tv_tensors.Image(read_picture(path, "RGB"))
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
