"""What the key of a digit scene attends to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.accuracy import key_attention
from benchmarks.accuracy.key_attention import PLACES, attention_of_key, places
from ema_attention import em_attention
from examples.digit_scenes import CELL, DIGITS, DigitScenes


def test_the_shares_are_those_that_em_attention_gives() -> None:
    x, mu = torch.randn(2, 6, 4, 5, dtype=torch.float64), F.normalize(torch.randn(6, 3, dtype=torch.float64), dim=0)
    is_key = torch.zeros(2, 4, 5, dtype=torch.bool)
    is_key[0, 1, 2] = is_key[1, 0, 0] = is_key[1, 3, 4] = True
    _, mu, z = em_attention(x, mu, 3)
    attention = attention_of_key(is_key, z)
    torch.testing.assert_close(attention.mean((1, 2)), torch.ones(2, dtype=torch.float64))
    means = x.flatten(2) @ (z / z.sum((2, 3), keepdim=True)).flatten(2).mT  # (B, C, K), to which the bases point
    rebuilt = ((mu * means.norm(dim=1, keepdim=True)) @ z.flatten(2)).view_as(x)
    for sample, (weights, key) in enumerate(zip(attention, is_key, strict=True)):
        torch.testing.assert_close((x[sample] * weights).mean((1, 2)), rebuilt[sample][:, key].mean(1))


def test_positions_are_told_apart_by_what_they_show() -> None:
    image, label = DigitScenes("test", 4)[3]
    (shown,) = places(image[None], label[None], 16)
    row, column = (shown == 0).nonzero().amin(0).tolist()
    assert (shown == 0).sum() == 16
    corner = 4 * row, 4 * column
    cell = image[:, corner[0] : corner[0] + CELL, corner[1] : corner[1] + CELL]
    assert cell[2].min() == 160
    pixels = shown.repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert not ((label == 1) & (pixels > 1)).any()
    assert not (image[0] > 200)[pixels == 3].any()
    for place, least in ((1, 2), (2, DIGITS - 5)):
        assert (shown == place).sum() >= 4 * least


def test_the_page_and_its_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_attention, "STEPS", (0, 1, 2))
    monkeypatch.setattr(key_attention, "SCENES", 3)
    key_attention.main(["--output", str(tmp_path)])
    text = (tmp_path / "key_attention.md").read_text()
    assert f"| unit | step | {' | '.join(PLACES)} |" in text
    for unit in key_attention.UNITS:
        for step in (0, 1, 2):
            assert text.count(f"| {unit} | {step} | ") == 1
    assert (tmp_path / "key_attention.png").read_bytes().startswith(b"\x89PNG")
