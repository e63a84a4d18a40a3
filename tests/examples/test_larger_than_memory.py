"""The example of features that do not fit in memory: it is stopped and goes on, and its memory stays flat."""

import os
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
from tests.trouble import file_size_limit, held_elsewhere


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


def results(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("out.npy", "bases.npy")]


def test_a_finished_run_is_neither_repeated_nor_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(tmp_path), "--positions", "1000", "--channels", "8", "--tile", "300", "--bases", "4"]
    larger_than_memory.main(command)
    done = results(tmp_path)
    capsys.readouterr()
    larger_than_memory.main(command)
    assert "out.npy and bases.npy are there already" in capsys.readouterr().out
    assert results(tmp_path) == done
    monkeypatch.setattr(larger_than_memory, "SECONDS_BETWEEN_SAVES", 0.0)
    other = larger_than_memory.attend(tmp_path, 5, 3, 300)
    for _ in zip(range(14), other, strict=False):
        pass
    other.close()  # killed in the last pass
    assert results(tmp_path) == done
    with pytest.raises(SystemExit):
        larger_than_memory.main(command)
    assert "state.pt is of a run with bases = 5; got bases = 4: remove it to start anew" in capsys.readouterr().err
    (tmp_path / "state.pt").unlink()
    larger_than_memory.main(command)
    assert results(tmp_path) == done
    (tmp_path / "out.npy").unlink()
    larger_than_memory.main(command)
    assert results(tmp_path) == done


def test_a_run_that_ends_between_its_results_and_its_state_is_not_taken_for_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    larger_than_memory.main([str(tmp_path), "--positions", "1000", "--channels", "8", "--tile", "300", "--bases", "4"])
    for file in ("bases", "out"):
        with monkeypatch.context() as patch:
            patch.setattr(*ends_after(file))
            with pytest.raises(KeyboardInterrupt):
                list(larger_than_memory.attend(tmp_path, 5, 3, 300))
        with pytest.raises(ValueError, match=r"state.pt is of a run with bases = 5; got bases = 4"):
            next(larger_than_memory.attend(tmp_path, 4, 3, 300))
    list(larger_than_memory.attend(tmp_path, 5, 3, 300))
    assert np.load(tmp_path / "bases.npy").shape == (8, 5)


def ends_after(file: str) -> tuple[object, str, object]:
    """What to patch so that a run ends when it has written ``file``."""
    owner, name = (larger_than_memory.os, "replace") if file == "out" else (np, "save")
    original = getattr(owner, name)

    def end(*args: object) -> None:
        original(*args)
        if file == "bases" or str(args[1]).endswith("out.npy"):
            raise KeyboardInterrupt

    return owner, name, end


def test_what_is_lost_of_an_unfinished_reconstruction_is_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(larger_than_memory, "SECONDS_BETWEEN_SAVES", 0.0)
    larger_than_memory.make_features(tmp_path / "features.npy", 1_000, 8, 300)
    whole, lost = tmp_path / "whole", tmp_path / "lost"
    for folder in (whole, lost):
        folder.mkdir()
        os.link(tmp_path / "features.npy", folder / "features.npy")
    list(larger_than_memory.attend(whole, 4, 1, 300))
    run = larger_than_memory.attend(lost, 4, 1, 300)
    for _ in zip(range(7), run, strict=False):
        pass
    run.close()
    unfinished = lost / "out.unfinished.npy"
    unfinished.write_bytes(unfinished.read_bytes()[:300])
    list(larger_than_memory.attend(lost, 4, 1, 300))
    assert results(lost) == results(whole)


def test_features_that_change_under_a_run_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(larger_than_memory, "SECONDS_BETWEEN_SAVES", 0.0)
    features = tmp_path / "features.npy"
    larger_than_memory.make_features(features, 1_000, 8, 300)
    run = larger_than_memory.attend(tmp_path, 4, 2, 300)
    next(run), next(run)
    rows = np.load(features)
    rows[5, 5] += 1
    np.save(features, rows)
    with pytest.raises(ValueError, match=r"features.npy was changed during the run: remove .*state.pt to start anew"):
        next(run)
    with pytest.raises(ValueError, match=r"state.pt is of a run with features = .*; got features = .* to start anew"):
        next(larger_than_memory.attend(tmp_path, 4, 2, 300))
    (tmp_path / "state.pt").unlink()
    run = larger_than_memory.attend(tmp_path, 4, 2, 300)
    next(run)
    features.unlink()
    with pytest.raises(ValueError, match=r"cannot read .*features.npy: .*No such file"):
        next(run)


def test_a_full_disk_and_a_second_run_are_told_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(tmp_path), "--positions", "1000", "--channels", "8", "--tile", "300", "--bases", "4"]
    for limit, name in ((10_000, "features"), (20_000, "out.unfinished")):
        with pytest.raises(SystemExit) as end, file_size_limit(limit):
            larger_than_memory.main(command)
        assert end.value.code == 2
        assert f"error: cannot write {tmp_path / name}.npy: File too large\n" in capsys.readouterr().err
        larger_than_memory.make_features(tmp_path / "features.npy", 1000, 8, 300)
    with pytest.raises(SystemExit):
        larger_than_memory.main([str(tmp_path / "features.npy")])
    assert "error: cannot write" in capsys.readouterr().err
    with held_elsewhere(tmp_path / ".lock"), pytest.raises(SystemExit):
        larger_than_memory.main(command)
    assert f"error: another process is writing in {tmp_path}: one at a time\n" in capsys.readouterr().err


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
