"""EM attention of a video: bases carried from each frame to the next, and the stages that saves.

python -m examples.video_stream FOLDER                every image in it, in the order of their names
python -m examples.video_stream FOLDER --frames 30 --bases 16

A cold start takes the bases from the frame's own farthest positions. A warm start takes the bases of the frame
before, after its one stage. The objective that EM climbs is then followed from both starts, for a number of
stages. It also writes a GIF of the carried bases' segments over the frames: they stay with the things.
It needs ``pip install "ema-attention[examples]"``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ema_attention import em_attention, em_stages
from ema_attention.look.pictures import certainty, colour_of_basis
from examples._common.files import write_figure, written_whole
from examples._common.photos import efficientnet_lite0, extract_features, farthest_positions, read_photo

REACHED = 0.01  # a start has arrived when it lacks at most this share of the cold start's climb
COLD, WARM = "#0072b2", "#d55e00"  # Okabe and Ito's blue and vermilion
OVERLAID, WIDTH, PAUSE = 60, 320, 250  # of the GIF: frames at most, pixels of each, milliseconds between them
IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def find_frames(folder: Path, frames: int) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"the folder of frames must exist; got {folder}")
    images = (path for path in folder.iterdir() if path.suffix.lower() in IMAGES and not path.name.startswith("."))
    paths = sorted(images)[:frames]
    if len(paths) < 2:
        raise ValueError(f"{folder} must hold 2 images or more; got {len(paths)}")
    return paths


def climb(x: Tensor, mu: Tensor, stages: int, scale: float) -> np.ndarray:
    """EM's objective of x (1, C, H, W), in nats a position, at the bases mu (1, C, K) and after each stage."""
    return (em_stages(x, mu, stages, scale=scale).objective[:, 0] / x[0, 0].numel()).numpy()


def stages_to(objectives: np.ndarray, target: float) -> int:
    """The number of stages after which the objective is at the target; all of them if it never is."""
    reached = np.flatnonzero(objectives >= target)
    return int(reached[0]) if len(reached) else len(objectives) - 1


@torch.no_grad()
def follow(paths: list[Path], args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, list[Image.Image]]:
    """The objectives (frames, stages + 1) of every frame but the first, from a cold and from a warm start.

    And the first frames with the segments of the carried bases over them.
    """
    backbone = efficientnet_lite0("DEFAULT")
    cold, warm, overlaid, carried, shape = [], [], [], None, None
    for path in tqdm(paths, unit="frame"):
        photo = read_photo(path, args.size)
        shape = photo.shape if shape is None else shape
        if photo.shape != shape:
            raise ValueError(
                f"{path} must have the height and width of the first frame, {shape[:2]}; got {photo.shape[:2]}"
            )
        x = F.normalize(extract_features(backbone, photo), dim=1)
        start = farthest_positions(x, args.bases)[None]
        if carried is None:
            carried = em_attention(x, start, args.stages, scale=args.scale).mu
        else:
            cold.append(climb(x, start, args.stages, args.scale))
            warm.append(climb(x, carried, args.stages, args.scale))
            carried = em_attention(x, carried, 1, scale=args.scale).mu
        if len(overlaid) < OVERLAID:
            overlaid.append(overlay(photo, em_attention(x, carried, 1, scale=args.scale).z[0]))
    return np.stack(cold), np.stack(warm), overlaid


def overlay(photo: np.ndarray, z: Tensor) -> Image.Image:
    """A photograph (H, W, 3) and, next to it, its strongest bases' colours over it, the fainter the more are equal."""
    size = WIDTH, round(WIDTH * photo.shape[0] / photo.shape[1])
    image = Image.fromarray(photo).resize(size)
    z = F.interpolate(z[None], size[::-1], mode="bilinear")[0]
    colours = torch.tensor([colour_of_basis(k) for k in range(len(z))])
    opacity = 0.6 * certainty(z)[..., None]
    blend = (
        opacity * colours[z.argmax(0)] + (1 - opacity) * torch.from_numpy(np.array(image.convert("L")))[..., None] / 255
    )
    both = np.concatenate([np.asarray(image), (255 * blend).byte().numpy()], 1)
    return Image.fromarray(both).quantize(128, dither=Image.Dither.NONE)


def plot(cold: np.ndarray, warm: np.ndarray, needed: np.ndarray) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    curves, histogram = figure.subplots(1, 2)
    stages = np.arange(cold.shape[1])
    reference = cold[:, -1:]
    for name, objectives, colour, style in (("cold", cold, COLD, "o-"), ("warm", warm, WARM, "s-")):
        relative = objectives - reference
        low, median, high = np.percentile(relative, [10, 50, 90], axis=0)
        curves.plot(stages, median, style, color=colour, markersize=4, label=f"{name} start, median over frames")
        curves.fill_between(stages, low, high, color=colour, alpha=0.2, linewidth=0, label="10th to 90th percentile")
    curves.set(xlabel="EM stages", ylabel="objective − the cold start's last (nats / position)")
    curves.legend(loc="lower right", fontsize="small")
    bins = np.arange(-0.5, needed.max() + 1.5)
    histogram.hist(needed[0], bins, color=COLD, alpha=0.7, label="cold start")
    histogram.hist(needed[1], bins, color=WARM, alpha=0.7, label="warm start", hatch="//", edgecolor="white")
    histogram.set(xlabel=f"stages to {1 - REACHED:.0%} of the cold start's climb", ylabel="frames")
    histogram.legend(fontsize="small")
    return figure


def run(args: argparse.Namespace) -> None:
    for name, least in (("stages", 1), ("frames", 2)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}; got {getattr(args, name)}")
    cold, warm, overlaid = follow(find_frames(args.folder, args.frames), args)
    targets = cold[:, -1] - REACHED * (cold[:, -1] - cold[:, 0])
    needed = np.array([[stages_to(row, t) for row, t in zip(rows, targets, strict=True)] for rows in (cold, warm)])
    print(f"{len(cold)} frames after the first, {args.bases} bases, scale {args.scale}")
    print(f"stages to {1 - REACHED:.0%} of the cold start's climb: median (10th to 90th percentile), mean")
    for name, counts in (("cold", needed[0]), ("warm", needed[1]), ("saved", needed[0] - needed[1])):
        low, median, high = np.percentile(counts, [10, 50, 90])
        print(f"  {name:6}{median:5.0f}  ({low:.0f} to {high:.0f}){counts.mean():8.1f}")
    never = int((warm[:, -1] < targets).sum())
    print(f"  a warm start that does not come there in {args.stages} stages: {never} of {len(warm)} frames")
    write_figure(plot(cold, warm, needed), args.output)
    print(f"picture: {args.output}")
    with written_whole(args.overlay) as file:
        overlaid[0].save(file, "GIF", save_all=True, append_images=overlaid[1:], duration=PAUSE, loop=0)
    print(f"segments over the frames: {args.overlay}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Bases carried from frame to frame, and the stages that saves.")
    parser.add_argument("folder", type=Path, help="images, consecutive in the order of their names")
    parser.add_argument("--frames", type=int, default=1000, help="at most so many (default: %(default)s)")
    parser.add_argument("--bases", type=int, default=16, help="K (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=10.0, help="sharpness of the E-step (default: %(default)s)")
    parser.add_argument("--stages", type=int, default=30, help="followed in each frame (default: %(default)s)")
    parser.add_argument("--size", type=int, default=448, help="pixels of the longer side (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("out/video_stream.png"), help="the picture (default: %(default)s)"
    )
    parser.add_argument(
        "--overlay",
        type=Path,
        default=Path("out/video_stream.gif"),
        help=f"the first {OVERLAID} frames with the segments of the carried bases over them (default: %(default)s)",
    )
    try:
        run(parser.parse_args(argv))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
