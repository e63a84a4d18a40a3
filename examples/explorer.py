"""The explorer of photographs, without any training: features of a pretrained network, then EM on the images.

python -m examples.explorer                  scikit-image's cat; needs no network
python -m examples.explorer *.jpg --bases 16

Of several images EM starts on all of them together, and ends with a few stages on each: then a basis is the same
thing in all of them. With ``--together 0`` it is EM on each image from a start that they have in common.

It writes one HTML file that any browser opens. It needs ``pip install "ema-attention[examples]"``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from ema_attention import explore_features
from examples._common.files import written_whole
from examples._common.photos import efficientnet_lite0, extract_features, farthest_positions, read_photo


def run(args: argparse.Namespace) -> None:
    started = time.perf_counter()

    def say(step: str) -> None:
        print(f"{time.perf_counter() - started:5.1f} s  {step}", flush=True)

    names = [path.name for path in args.images] or ["the cat of scikit-image"]
    photos = [read_photo(path, args.size) for path in args.images or [None]]
    backbone = efficientnet_lite0("DEFAULT")
    say("weights of efficientnet-lite0")
    features = []
    for i, (name, photo) in enumerate(zip(names, photos, strict=True), start=1):
        x = extract_features(backbone, photo, centred=False)
        features.append(x)
        say(f"{i} of {len(names)}: {name}, features at {x.shape[2]}×{x.shape[3]} positions")
    everything = torch.cat([x.flatten(2) for x in features], 2)  # (1, C, N)
    mean = everything.mean(2, keepdim=True)  # one for all, as a start is
    mu = farthest_positions(everything - mean, args.bases)
    x = [F.normalize(x - mean[..., None], dim=1) for x in features]
    page = explore_features(
        x, mu, photos, stages=args.stages, together=args.together, scale=args.scale, names=names
    ).encode()
    if len(photos) > 1:
        say(f"{args.together} stages of EM on all together, {args.stages} on each")
    else:
        say(f"{args.together + args.stages} stages of EM")
    with written_whole(args.output) as file:
        file.write(page)
    say(f"page: {args.output}, {len(page) / 1e6:.1f} MB")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A page to look into EM attention on photographs, without training.")
    parser.add_argument("images", type=Path, nargs="*", help="any images Pillow reads (default: scikit-image's cat)")
    parser.add_argument("--bases", type=int, default=6, help="K (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=10.0, help="sharpness of the E-step (default: %(default)s)")
    parser.add_argument("--together", type=int, default=12, help="EM stages on all images (default: %(default)s)")
    parser.add_argument("--stages", type=int, default=3, help="EM stages on each, after (default: %(default)s)")
    parser.add_argument("--size", type=int, default=448, help="pixels of the longer side (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("out/explorer.html"), help="the page (default: %(default)s)"
    )
    try:
        run(parser.parse_args(argv))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
