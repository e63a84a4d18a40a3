"""The example of features that do not fit in memory: it is stopped and goes on, and its memory stays flat."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ema_attention import em_attention
from examples import larger_than_memory


def test_the_example_goes_on_wherever_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bases, stages, size = 8, 2, 300
    monkeypatch.setattr(larger_than_memory, "SECONDS_BETWEEN_SAVES", 0.0)
    larger_than_memory.make_features(tmp_path / "features.npy", 1_000, 16, size)
    stops = 0
    while not (tmp_path / "bases.npy").exists():
        run = larger_than_memory.attend(tmp_path, bases, stages, size)
        for _ in zip(range(3), run, strict=False):  # three tiles, the last of them not saved, and dead
            pass
        run.close()
        stops += 1
        assert stops < 20
    assert stops > 3
    features = torch.from_numpy(np.load(tmp_path / "features.npy"))
    mu = F.normalize(torch.randn(16, bases, generator=torch.Generator().manual_seed(0)), dim=0)
    expected = em_attention(features.T[None].double(), mu.double(), stages)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected.out[0].T, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "bases.npy"), expected.mu[0], rtol=0, atol=1e-5)


def test_the_example_measures_flat_memory(tmp_path: Path) -> None:
    positions = 600_000
    larger_than_memory.make_features(tmp_path / "features.npy", positions, 32, 10_000)
    # in a process of its own: a peak is that of the process's whole life
    command = [sys.executable, "-m", "examples.larger_than_memory", str(tmp_path), "--tile", "10000", "--bases", "8"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "600,000 positions of 32 channels" in text
    assert "reconstruction" in text
    peak, before = (float(number) for number in re.findall(r"(\d+) MiB", text))
    assert peak - before < 40  # the features are 73 MiB, as is the reconstruction


def test_the_example_says_what_is_wrong_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "features.npy", np.zeros(5))
    with pytest.raises(SystemExit) as end:
        larger_than_memory.main([str(tmp_path)])
    assert end.value.code == 2
    assert "must hold (N, C) float32; got (5,) float64" in capsys.readouterr().err
