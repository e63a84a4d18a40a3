"""What the unit learns in a network that is trained already."""

from __future__ import annotations

import itertools
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.accuracy import insertion
from benchmarks.accuracy.insertion import INSERTED, SHARES, TASK, results
from benchmarks.accuracy.tasks import BETTER_START
from benchmarks.blocks import PUBLISHED, unit_name
from examples._common import runs
from examples.digit_scenes import DigitScenes

INTERRUPTED = 3
"""The network, of all that are trained, in which Ctrl-C comes."""


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps, of a few scenes, in which BatchNorm's running statistics do not move."""
    recipe = replace(TASK.recipe, steps=3, batch=4, evaluate_every=2, norm_momentum=0.0)
    data = lambda _, split: DigitScenes(split, 8)  # noqa: E731
    monkeypatch.setattr(insertion, "TASK", TASK._replace(recipe=recipe, data=data))


@pytest.mark.usefixtures("recipe")
def test_the_block_is_put_into_the_trained_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(insertion, "SHARES", {0.0: "nothing is trained on"})
    before, *inserted = results(tmp_path, 1)
    assert before.test > 0
    scores = {result.block: result.test for result in inserted}
    assert list(scores) == list(INSERTED)
    assert scores["no block"] == scores[unit_name("all", 0)] == before.test
    loud = {scores[PUBLISHED], scores[unit_name("all", 1)], scores[BETTER_START]}
    assert before.test not in loud
    assert len(loud) == 2  # γ 1 is the same forward with either gradient


@pytest.mark.usefixtures("recipe")
def test_the_page_and_its_picture_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    validations = itertools.count()
    validate = runs.Run.validate

    def interrupted(self: runs.Run) -> None:
        if next(validations) == 2 * INTERRUPTED:
            signal.raise_signal(signal.SIGINT)
        validate(self)

    monkeypatch.setattr(runs.Run, "validate", interrupted)
    call = ["--seeds", "1", "--folder", str(tmp_path / "networks"), "--output", str(tmp_path)]
    insertion.main(call)
    assert "stopped" in capsys.readouterr().out
    assert not (tmp_path / "insertion.md").exists()
    insertion.main(call)
    assert next(validations) == 2 * (1 + len(INSERTED) * len(SHARES))  # none is trained twice
    text = (tmp_path / "insertion.md").read_text()
    assert f"| block | {' | '.join(SHARES.values())} |" in text
    assert "over 1 seed" in text
    for block in INSERTED:
        assert text.count(f"| {block} | ") == 1
    assert (tmp_path / "insertion.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_number_of_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        insertion.main(["--seeds", "0"])
    assert "--seeds must be at least 1; got 0" in capsys.readouterr().err
