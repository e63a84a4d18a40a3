"""What maps say about classes without any training of the maps: bases as segments of CamVid's frames.

python -m benchmarks.accuracy.segments --root CAMVID       segments.json, segments.md and its pictures
python -m benchmarks.accuracy.segments                     the page and its plot again, from segments.json

The features are those of the demo, of a network that was trained on ImageNet. Bases are found in them without any
label, but for one number, the scale. Then each basis gets the class that most of its pixels have in training, and that
is its class in validation.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import sklearn
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor
from tqdm import tqdm

from benchmarks.accuracy.segment_pictures import plot_frames, plot_scores
from benchmarks.accuracy.segment_tables import ADAPTED, AFRESH, JOINT, KMEANS, PICTURED, SOFT, report
from benchmarks.accuracy.sweep_runs import FOLDER
from benchmarks.environment import environment
from benchmarks.measure import summary
from benchmarks.plot_style import png
from benchmarks.reporting import read_results, write_files
from ema_attention import TiledEMAttention, em_attention
from examples._common.evaluation import mean_iou
from examples._common.photos import STRIDE, efficientnet_lite0, extract_features
from examples._common.samples import IGNORE
from examples.emanet.data import Segmentation, camvid

SIZE = (360, 480)
BASES = (6, 16, 64, 128)
SEEDS = (0, 1, 2)
DEMO_SCALE = 10.0
SCALES = (DEMO_SCALE, 20.0, 40.0, 80.0)
SCALE_BASES = 64  # with which the scale is chosen
BATCH = 16_384  # of k-means: faster than its default, and no worse
ALIKE = 0.98  # the cosine above which two bases are as good as one
TOGETHER, STAGES = 12, 3  # the explorer's: on all frames, then on each; in a frame alone it is their sum, the demo's
DRAWN = (JOINT, ADAPTED, KMEANS, AFRESH)
SHOWN = 6  # frames


class Frames(NamedTuple):
    """F frames of N positions with C channels."""

    features: Tensor
    """(F, N, C), of length 1."""
    pixels: Tensor
    """(F, N, classes): how many of a position's pixels have each class."""


class Found(NamedTuple):
    """The bases that a method found, in each of some frames."""

    strongest: Tensor
    """(F, N): the basis, of the frame's K, that each position belongs to."""
    names: Tensor
    """(F, K): which of the bases of all frames each of the frame's is."""
    classes: Tensor
    """(K,): the class of each of the bases of all frames."""

    def named(self) -> Tensor:
        """(F, N): the basis, of those of all frames, that each position belongs to."""
        return self.names.gather(1, self.strongest)


def read_frames(dataset: Segmentation, backbone: Callable[[Tensor], Tensor]) -> tuple[Frames, list[float]]:
    """The features as the backbone gives them, the pixels, and the CPU seconds that each frame's features took."""
    features, pixels, seconds = [], [], []
    for index in tqdm(range(len(dataset)), "features", unit="frame", leave=False):
        image, mask = dataset[index]
        began = time.process_time()
        x = extract_features(backbone, image.permute(1, 2, 0).numpy(), centred=False)
        seconds.append(time.process_time() - began)
        features.append(x[0].flatten(1).T)
        pixels.append(pixels_of_positions(mask, len(dataset.names)))
    return Frames(torch.stack(features), torch.stack(pixels)), seconds


def pixels_of_positions(mask: Tensor, classes: int) -> Tensor:
    """How many pixels of each class (N, classes) a position stands for; mask (H, W), of sides that STRIDE divides."""
    one_hot = F.one_hot(torch.where(mask == IGNORE, classes, mask).long(), classes + 1)[..., :classes]
    return one_hot.unflatten(1, (-1, STRIDE)).unflatten(0, (-1, STRIDE)).sum((1, 3)).flatten(0, 1)


def count(groups: Tensor, pixels: Tensor, number: int) -> Tensor:
    """How many pixels of each class (number, classes) are in each group; groups (...), pixels (..., classes)."""
    counts = pixels.new_zeros(number, pixels.shape[-1])
    return counts.index_add_(0, groups.flatten(), pixels.flatten(0, -2))


def majority(counts: Tensor) -> Tensor:
    """The class (K,) that most pixels of each basis have; counts (K, classes).

    A basis without any pixel gets the class that most pixels of all have.
    """
    return torch.where(counts.sum(1) > 0, counts.argmax(1), counts.sum(0).argmax())


def class_iou(predicted: Tensor, pixels: Tensor) -> list[float]:
    """IoU of every class over the frames; NaN for a class that is neither there nor predicted. predicted (F, N)."""
    counts = count(predicted, pixels, pixels.shape[-1])
    both = counts.diag()
    return (both / (counts.sum(0) + counts.sum(1) - both)).tolist()


def score(found: Found, frames: Frames) -> dict[str, list[float]]:
    """IoU with the classes that the bases have, and with those that suit each frame's own labels best, the oracle."""
    oracle = [
        majority(count(strongest, pixels, len(found.classes)))[strongest]
        for strongest, pixels in zip(found.strongest, frames.pixels, strict=True)
    ]
    return {
        "iou": class_iou(found.classes[found.named()], frames.pixels),
        "oracle": class_iou(torch.stack(oracle), frames.pixels),
    }


def random_positions(features: Tensor, bases: int, seed: int) -> Tensor:
    """The features (C, K) of K different positions of (..., C)."""
    rows = features.flatten(0, -2)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:bases]].T


def find_jointly(features: Tensor, bases: int, seed: int, scale: float) -> Tensor:
    """The bases (C, K) of all frames (F, N, C) together: each frame is a tile."""
    em = TiledEMAttention(random_positions(features, bases, seed), scale=scale)
    for _ in range(TOGETHER):
        for frame in features:
            em.add(frame.T[None])
        em.step()
    return em.mu[0]


def find_in_frame(frame: Tensor, mu: Tensor, stages: int, scale: float) -> tuple[Tensor, Tensor]:
    """The strongest basis (N,) at each position of a frame (N, C) in the last stage from mu on; the bases (C, K)."""
    _, mu, z = em_attention(frame.T[None], mu, stages, scale=scale)
    return z[0].argmax(0), mu[0]


def choose_scale(train: Frames) -> dict[float, float]:
    """MIoU in training, from 0 to 1, of joint bases with each scale."""
    scores = {}
    for scale in tqdm(SCALES, "scales", leave=False):
        mu = find_jointly(train.features, SCALE_BASES, SEEDS[0], scale)
        strongest = (train.features @ mu).argmax(2)
        classes = majority(count(strongest, train.pixels, SCALE_BASES))
        scores[scale] = mean_iou(class_iou(classes[strongest], train.pixels))
    return scores


def repeated(mu: Tensor) -> int:
    """How many of the bases (C, K) are nearly the direction of another."""
    directions = F.normalize(mu, dim=0)
    return int(((directions.T @ directions).fill_diagonal_(-1).amax(0) > ALIKE).sum())


def timed(call: Callable[[Tensor], Any], frames: Tensor) -> tuple[list[Any], list[float]]:
    """What a call gives for each frame, and the CPU seconds that each took."""
    results, seconds = [], []
    for frame in frames:
        began = time.process_time()
        results.append(call(frame))
        seconds.append(time.process_time() - began)
    return results, seconds


def compare(
    train: Frames, val: Frames, bases: int, seed: int, scale: float
) -> tuple[list[dict[str, Any]], dict[str, Found]]:
    """A row for each method, and what each method found in the frames of validation."""

    def fit(find: Callable[[], Tensor]) -> tuple[Tensor, dict[str, float]]:
        began = time.process_time()
        mu = find()
        return mu, {"fit": time.process_time() - began, "repeated": repeated(mu)}

    kmeans = MiniBatchKMeans(bases, random_state=seed, batch_size=BATCH, compute_labels=False)
    joint, joint_facts = fit(lambda: find_jointly(train.features, bases, seed, scale))
    soft, soft_facts = fit(lambda: find_jointly(train.features, bases, seed, DEMO_SCALE))
    _, kmeans_facts = fit(lambda: torch.from_numpy(kmeans.fit(train.features.flatten(0, 1).numpy()).cluster_centers_).T)
    methods: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, float]]] = {
        JOINT: (lambda frame: (frame @ joint).argmax(1), joint_facts),
        SOFT: (lambda frame: (frame @ soft).argmax(1), soft_facts),
        ADAPTED: (lambda frame: find_in_frame(frame, joint, STAGES, scale)[0], joint_facts),
        KMEANS: (lambda frame: torch.from_numpy(kmeans.predict(frame.numpy())).long(), kmeans_facts),
    }
    found, facts = {}, {}
    for method, (assign, of_bases) in methods.items():
        in_training = torch.stack([assign(frame) for frame in train.features])
        classes = majority(count(in_training, train.pixels, bases))
        strongest, seconds = timed(assign, val.features)
        found[method] = Found(torch.stack(strongest), torch.arange(bases).expand(len(strongest), -1), classes)
        facts[method] = {**of_bases, "frame": summary(seconds)}

    afresh, seconds = timed(
        lambda frame: find_in_frame(frame, random_positions(frame, bases, seed), TOGETHER + STAGES, scale),
        val.features,
    )
    nearest = [(mu.T @ joint).argmax(1) for _, mu in afresh]
    found[AFRESH] = Found(torch.stack([s for s, _ in afresh]), torch.stack(nearest), found[JOINT].classes)
    facts[AFRESH] = {"frame": summary(seconds)}
    rows = [
        {"method": method, "bases": bases, "seed": seed, **score(result, val), **facts[method]}
        for method, result in found.items()
    ]
    return rows, found


def bounds(train: Frames, val: Frames) -> dict[str, list[float]]:
    """IoU without any bases: of the most frequent class everywhere, and of each position's own most frequent class."""
    most_frequent = train.pixels.sum((0, 1)).argmax().expand(val.pixels.shape[:2])
    return {"floor": class_iou(most_frequent, val.pixels), "ceiling": class_iou(val.pixels.argmax(2), val.pixels)}


@torch.no_grad()
def measure(root: Path) -> tuple[dict[str, Any], Figure]:
    """All results, and the picture of frames.

    Raises:
        ValueError: if CamVid is not there.
    """
    sets = {split: camvid(root, split, SIZE) for split in ("train", "val")}
    backbone = efficientnet_lite0("DEFAULT")
    train, _ = read_frames(sets["train"], backbone)
    val, seconds = read_frames(sets["val"], backbone)
    mean = train.features.mean((0, 1))
    train, val = (Frames(F.normalize(x - mean, dim=2), pixels) for x, pixels in (train, val))
    scales = choose_scale(train)
    scale = max(scales, key=scales.__getitem__)
    rows, picture = [], None
    runs = [(bases, seed) for bases in BASES for seed in SEEDS]
    for bases, seed in tqdm(runs, "bases and seeds", leave=False):
        new, found = compare(train, val, bases, seed, scale)
        rows += new
        if (bases, seed) == (PICTURED, SEEDS[0]):
            shown = torch.linspace(0, len(sets["val"]) - 1, SHOWN).long()
            grid = [side // STRIDE for side in SIZE]
            maps = {name: (found[name].named()[shown].unflatten(1, grid), found[name].classes) for name in DRAWN}
            picture = plot_frames(sets["val"], maps, shown.tolist())
    settings = {
        "frames": {split: len(frames) for split, frames in sets.items()},
        "size": SIZE,
        "channels": len(mean),
        "scale": scale,
        "scales": {f"{scale:g}": score for scale, score in scales.items()},
        "scale_bases": SCALE_BASES,
        "stride": STRIDE,
        "joint_stages": TOGETHER,
        "frame_stages": STAGES,
        "lone_stages": TOGETHER + STAGES,
        "demo_scale": DEMO_SCALE,
        "batch": BATCH,
    }
    results = {
        "environment": {**environment(), "scikit-learn": sklearn.__version__},
        "settings": settings,
        "features": summary(seconds),
        "bounds": bounds(train, val),
        "rows": rows,
    }
    return results, picture


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.segments", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--root", type=Path, help="the folder of CamVid: measure (default: the page and its plot again)"
    )
    parser.add_argument("--results", type=Path, default=FOLDER, help="the folder of the results (default: %(default)s)")
    args = parser.parse_args(arguments)
    numbers = args.results / "segments.json"
    try:
        if args.root:
            results, picture = measure(args.root)
            files = {numbers.name: (json.dumps(results, indent=1) + "\n").encode(), "segments.png": png(picture)}
            write_files(args.results, files)
        if not numbers.exists():
            raise ValueError(f"{numbers} does not exist: --root, the folder of CamVid, makes it")
        results = read_results(numbers, "environment", "settings", "features", "bounds", "rows")
        files = {"segments.md": report(results).encode(), "segments_scores.png": png(plot_scores(results))}
        write_files(args.results, files)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    print(args.results / "segments.md")


if __name__ == "__main__":
    main()
