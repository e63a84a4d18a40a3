"""The maps as segments: votes, scores, and the page from pictures to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchmetrics.classification import MulticlassJaccardIndex

from benchmarks.accuracy import segments
from benchmarks.accuracy.scores import percent
from benchmarks.accuracy.segment_pictures import plot_scores, shades
from benchmarks.accuracy.segment_tables import AFRESH, JOINT, KMEANS, METHODS, SOFT, report
from benchmarks.accuracy.segments import Found, Frames
from benchmarks.accuracy.sweep_runs import FOLDER
from ema_attention import em_attention
from examples._common.samples import IGNORE
from examples.emanet.data import CAMVID_COLOURS, CAMVID_NAMES

COLOURS = {0: (200, 40, 40), 3: (40, 200, 40), 5: (40, 40, 200)}
"""Of three classes in pictures that are made up."""
VOID = 11
SIZE = (32, 48)


def write_frames(root: Path, frames: int) -> None:
    """Frames of 8×8 blocks in the colours of their classes, with noise; a corner has no label."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (root / split).mkdir()
        (root / f"{split}annot").mkdir()
        for index in range(frames):
            blocks = rng.choice(list(COLOURS), [side // 8 for side in SIZE])
            mask = np.kron(blocks, np.ones((8, 8), int)).astype(np.uint8)
            image = np.array([COLOURS.get(label, (0, 0, 0)) for label in range(VOID)])[mask]
            mask[:4, :4] = VOID
            noisy = image + rng.integers(-20, 20, image.shape)
            Image.fromarray(noisy.astype(np.uint8)).save(root / split / f"{index}.png")
            Image.fromarray(mask).save(root / f"{split}annot" / f"{index}.png")


@pytest.fixture
def camvid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like CamVid's, and mean colours in the place of a network's features."""
    root = tmp_path / "camvid"
    root.mkdir()
    write_frames(root, 4)
    monkeypatch.setattr(segments, "efficientnet_lite0", lambda weights: lambda images: F.avg_pool2d(images, 8))
    for name, value in {
        "SIZE": SIZE,
        "BASES": (2, 8),
        "SCALE_BASES": 8,
        "SEEDS": (0, 1),
        "PICTURED": 8,
        "SHOWN": 3,
    }.items():
        monkeypatch.setattr(segments, name, value)
    return root


def test_colours_are_found_without_labels_and_named_by_training(camvid: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    segments.main(["--root", str(camvid), "--results", str(out)])
    results = json.loads((out / "segments.json").read_text())
    assert len(results["rows"]) == len(METHODS) * 2 * 2
    for row in results["rows"]:
        if row["method"] in (JOINT, KMEANS):
            assert (percent(row["iou"]) == 100) == (row["bases"] == 8)  # two bases are too few for three colours
        assert percent(row["iou"]) > percent(results["bounds"]["floor"]) + 15
        assert sorted(label for label, iou in enumerate(row["iou"]) if iou == iou) == list(COLOURS)
        assert ("fit" in row) == ("repeated" in row) == (row["method"] != AFRESH)
        assert row["frame"]["samples"] == 4
    assert percent(results["bounds"]["ceiling"]) == 100
    assert percent(results["bounds"]["floor"]) < 20
    page = (out / "segments.md").read_text()
    assert page == report(results)
    assert "| joint EM | " in page
    assert {path.name for path in out.iterdir()} == {
        "segments.json",
        "segments.md",
        "segments.png",
        "segments_scores.png",
    }
    assert (out / "segments.png").read_bytes().startswith(b"\x89PNG")
    (out / "segments.md").unlink()
    segments.main(["--results", str(out)])
    assert (out / "segments.md").read_text() == page


def test_what_is_missing_is_said_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([], "segments.json does not exist: --root, the folder of CamVid, makes it"),
        (["--root", str(tmp_path)], f"CamVid needs the folder {tmp_path / 'train'}, which does not exist"),
    ):
        with pytest.raises(SystemExit) as error:
            segments.main(["--results", str(tmp_path), *arguments])
        assert error.value.code == 2
        assert message in capsys.readouterr().err


def test_a_basis_gets_the_class_of_most_of_its_pixels() -> None:
    strongest = torch.tensor([[0, 0, 1], [1, 1, 3]])
    pixels = torch.tensor([[[5, 1], [0, 4], [0, 9]], [[2, 0], [6, 0], [1, 8]]])
    counts = segments.count(strongest, pixels, 4)
    assert counts.tolist() == [[5, 5], [8, 9], [0, 0], [1, 8]]
    assert segments.majority(counts)[[1, 3]].tolist() == [1, 1]


def test_a_basis_that_wins_nothing_in_training_gets_the_most_frequent_class() -> None:
    assert segments.majority(torch.tensor([[4, 1, 0], [0, 0, 0], [0, 2, 6]])).tolist() == [0, 2, 2]


def test_the_iou_is_that_of_the_pixels() -> None:
    """Of a prediction that is the same in the 8×8 pixels of a position; no class 3 is there or predicted."""
    mask = torch.randint(0, 3, (2, 16, 24))
    mask[:, :5, :7] = IGNORE
    predicted = torch.randint(0, 3, (2, 2 * 3))
    pixels = torch.stack([segments.pixels_of_positions(m, 4) for m in mask])
    assert pixels.shape == (2, 6, 4)
    assert pixels.sum() == (mask != IGNORE).sum()
    metric = MulticlassJaccardIndex(4, "none", ignore_index=IGNORE, zero_division=float("nan"))
    upsampled = predicted.view(2, 2, 3).repeat_interleave(8, 1).repeat_interleave(8, 2)
    torch.testing.assert_close(
        torch.tensor(segments.class_iou(predicted, pixels)), metric(upsampled, mask), equal_nan=True
    )


def test_joint_bases_are_those_of_all_frames_put_together() -> None:
    features = F.normalize(torch.randn(3, 20, 5), dim=2)
    start = segments.random_positions(features, 4, 7)
    assert all((features.flatten(0, 1) == column).all(1).any() for column in start.T)
    expected = em_attention(features.flatten(0, 1).T[None], start, segments.TOGETHER, scale=20).mu[0]
    torch.testing.assert_close(segments.find_jointly(features, 4, 7, 20.0), expected)


def test_bases_of_nearly_one_direction_are_counted() -> None:
    mu = torch.tensor([[1.0, 2.0, 1.0, 0.0], [0.0, 0.1, 1.0, 1.0]])
    assert segments.repeated(mu) == 2


def test_bases_of_a_frame_are_named_after_those_of_all_frames_and_the_oracle_is_not_bound_to_names() -> None:
    found = Found(torch.tensor([[0, 1], [0, 1]]), torch.tensor([[2, 0], [0, 2]]), torch.tensor([4, 5, 6]))
    assert found.named().tolist() == [[2, 0], [0, 2]]
    pixels = F.one_hot(torch.tensor([[6, 4], [6, 4]]), 7)
    scores = segments.score(found, Frames(torch.empty(2, 2, 0), pixels))
    assert scores["iou"][4] == scores["iou"][6] == pytest.approx(1 / 3)  # right in the first frame alone
    assert scores["oracle"][4] == scores["oracle"][6] == 1


def test_shades_tell_bases_of_a_class_apart() -> None:
    colours = shades(torch.tensor([0, 3, 0, 0]), CAMVID_COLOURS)
    assert colours[1].tolist() == pytest.approx([part / 255 for part in CAMVID_COLOURS[3]])
    assert len({tuple(colour) for colour in colours}) == 4
    assert (colours >= 0).all()
    assert (colours <= 1).all()


def made_up() -> dict[str, Any]:
    def row(method: str, bases: int, seed: int) -> dict[str, Any]:
        iou = [float("nan"), *[0.2 + seed / 10] * 10]
        costs = {
            "fit": 2.0 + seed,
            "repeated": 4 + seed,
            "frame": {"median": 0.004, "quartiles": [0.003, 0.005], "samples": 9},
        }
        return {"method": method, "bases": bases, "seed": seed, "iou": iou, "oracle": [0.5] * 11, **costs}

    settings = {
        "frames": {"train": 3, "val": 2},
        "size": [360, 480],
        "channels": 112,
        "scale": 40.0,
        "scales": {"10": 0.25, "40": 0.275},
        "scale_bases": 64,
        "stride": 8,
        "joint_stages": 9,
        "frame_stages": 2,
        "lone_stages": 11,
        "demo_scale": 10.0,
        "batch": 1024,
    }
    return {
        "environment": {
            "machine": "a machine",
            "threads": 1,
            "torch": "2.14",
            "scikit-learn": "1.9",
            "commit": "0123456789",
        },
        "settings": settings,
        "features": {"median": 0.25},
        "bounds": {"floor": [0.03] * 11, "ceiling": [0.9] * 11},
        "rows": [row(method, bases, seed) for method in METHODS for bases in (6, 16) for seed in (0, 1, 2)],
    }


def test_the_page_has_means_and_deviations_over_the_seeds() -> None:
    page = report(made_up())
    intro, scores, oracle, fit, repeated, frame, *_ = page.split("\n## ")
    assert "mIoU in training at K = 64 (10: 25.0, 40: 27.5)." in intro
    assert "channels at 60×45 positions of CamVid's frames, 480×360;" in intro
    assert "on all training frames together, 9 stages;" in intro
    assert f"- *{AFRESH}*: 11 stages on each frame alone;" in intro
    for method in METHODS:
        assert f"| {method} | 30.0 ± 10.0 | 30.0 ± 10.0 |" in scores
        assert f"| {method} | 50.0 ± 0.0 | 50.0 ± 0.0 |" in oracle
        assert f"| {method} | 4.0 | 4.0 |" in frame
    assert "| the most frequent class everywhere | 3.0 | 3.0 |" in scores
    assert f"| {JOINT} | 3.0 | 3.0 |" in fit
    assert f"| {SOFT} | 5.0 | 5.0 |" in repeated
    assert AFRESH not in fit + repeated
    assert "take 250 ms a frame" in frame
    assert f"| {JOINT} | nan | " in page.partition(" | ".join(CAMVID_NAMES))[2]


def test_the_plot_has_a_line_for_each_method_and_naming() -> None:
    for ax, score in zip(plot_scores(made_up()).axes, (30, 50), strict=True):
        assert len(ax.containers) == len(METHODS)
        assert ax.containers[0].lines[0].get_ydata().tolist() == pytest.approx([score, score])


def test_the_committed_page_is_of_the_committed_numbers() -> None:
    results = json.loads((FOLDER / "segments.json").read_text())
    assert (FOLDER / "segments.md").read_text() == report(results)
    assert {row["method"] for row in results["rows"]} == set(METHODS)
