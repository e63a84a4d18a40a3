"""Bases carried from frame to frame: a warm start on a moving sequence needs fewer stages than a cold one."""

import re
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ema_attention import em_attention
from examples import video_stream

SCALE = 5.0


def moving_sequence(frames: int, channels: int = 16, size: int = 24) -> Tensor:
    """A camera that pans over a scene of five materials, with noise anew in every frame: (frames, C, H, W)."""
    materials = F.normalize(torch.randn(channels, 5), dim=0)
    regions = F.interpolate(torch.randn(1, 5, 6, 12), (size, 3 * size), mode="bicubic").argmax(1)[0]
    scene = materials[:, regions]
    return torch.stack([scene[:, :, i : i + size] + 0.1 * torch.randn(channels, size, size) for i in range(frames)])


def test_stages_may_be_taken_one_by_one() -> None:
    (x,) = moving_sequence(1)
    mu = together = F.normalize(torch.randn(16, 5), dim=0)
    for _ in range(4):
        mu = em_attention(x[None], mu, 1, scale=SCALE).mu
    torch.testing.assert_close(mu, em_attention(x[None], together, 4, scale=SCALE).mu)


def test_a_warm_start_begins_where_a_cold_one_needs_stages_to_come_to() -> None:
    first, *frames = moving_sequence(12).split(1)
    cold = F.normalize(torch.randn(16, 5), dim=0)
    warm = em_attention(first, cold, 20, scale=SCALE).mu
    saved = []
    for x in frames:
        reached = video_stream.climb(x, warm, 1, SCALE)[1]
        saved.append(video_stream.stages_to(video_stream.climb(x, cold, 20, SCALE), reached) - 1)
        warm = em_attention(x, warm, 1, scale=SCALE).mu
    assert min(saved) >= 2, saved


def test_the_example_on_a_panning_camera(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = skimage.data.chelsea()
    for i in range(4):
        Image.fromarray(photo[:, 8 * i : 8 * i + 300]).save(tmp_path / f"{i}.png")
    output, moving = tmp_path / "new" / "picture.png", tmp_path / "new" / "moving.gif"
    objectives = []
    plot = video_stream.plot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video_stream, "plot", lambda *args: objectives.extend(args) or plot(*args))
        options = ["--size", "128", "--bases", "6", "--output", str(output), "--overlay", str(moving)]
        video_stream.main([str(tmp_path), *options])
    cold, warm, needed = objectives
    # Which of many optima a start comes to depends on the last digit of the features, and so on the number of
    # threads. That carried bases begin where a cold start has to climb to does not.
    assert (warm[:, 0] > cold[:, 1]).all()
    text = capsys.readouterr().out
    for name, counts in (("cold", needed[0]), ("warm", needed[1])):
        assert re.search(rf"  {name} +{int(np.median(counts))} .* {counts.mean():.1f}\n", text)
    with Image.open(output) as picture:
        assert picture.width > 500
    with Image.open(moving) as frames:
        assert frames.n_frames == 4
        assert frames.width == 2 * video_stream.WIDTH


def test_the_overlay_has_the_colour_of_the_strongest_basis_the_fainter_the_more_are_equal() -> None:
    photo = np.full((64, 96, 3), 100, np.uint8)
    z = torch.full((3, 8, 12), 1 / 3)
    z[:, :, 6:] = torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1)
    pixels = np.asarray(video_stream.overlay(photo, z).convert("RGB")).astype(int)
    assert pixels.shape == (213, 640, 3)
    assert (np.abs(pixels[:, :460] - 100) <= 2).all()  # the photograph, and where all are equal
    assert (np.abs(pixels[100, 620] - (0.6 * np.array([0x56, 0xB4, 0xE9]) + 0.4 * 100)) <= 3).all()


@pytest.mark.parametrize(("name", "message"), [("nowhere", "must exist"), (".", "must hold 2 images or more; got 0")])
def test_the_example_says_what_is_wrong_in_a_sentence(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        video_stream.main([str(tmp_path / name)])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
