"""What the unit learns in a network that is trained already."""

from __future__ import annotations

import itertools
import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.accuracy import insertion
from benchmarks.accuracy.insertion import BEFORE, INSERTED, SHARES, TASK, Result, report, results
from benchmarks.accuracy.sweep_runs import FOLDER
from benchmarks.accuracy.tasks import RECOMMENDED
from benchmarks.blocks import DEFAULTS, unit_name
from examples._common import runs
from examples.digit_scenes import DigitScenes

DONE = 3
"""How many networks are trained when Ctrl-C comes."""


@pytest.fixture
def short_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps with few scenes, in which BatchNorm's running statistics do not move."""
    recipe = replace(TASK.recipe, steps=3, batch=4, evaluate_every=2, norm_momentum=0.0)
    monkeypatch.setattr(insertion, "TASK", TASK._replace(recipe=recipe, data=lambda _, split: DigitScenes(split, 8)))


@pytest.mark.usefixtures("short_task")
def test_the_block_is_put_into_the_trained_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(insertion, "SHARES", {1.0: "trained on", 0.0: "nothing moves"})
    before, *inserted = results(tmp_path, 1)
    assert before.test > 0
    scores = {result.block: result.test for result in inserted if result.share == 0}
    assert list(scores) == list(INSERTED)
    assert scores["no block"] == scores[unit_name("all", 0)] == before.test
    loud = {scores[DEFAULTS], scores[unit_name("all", 1)], scores[RECOMMENDED]}
    assert before.test not in loud
    assert len(loud) == 2  # γ 1 is the same forward with either gradient
    gammas = {result.block: result.gamma for result in inserted if result.share == 0}
    assert gammas == {
        "no block": None,
        DEFAULTS: 1,
        unit_name("all", 0): 0,
        RECOMMENDED: 0.25,
        unit_name("all", 1): 1,
    }
    unmoved = {result.val[0] for result in inserted if result.block in ("no block", unit_name("all", 0))}
    assert len(unmoved) == 1  # what was trained on in between is not theirs
    assert unmoved <= set(before.val.values())


@pytest.mark.usefixtures("short_task")
def test_the_page_and_its_picture_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    validations = itertools.count()
    validate = runs.Run.validate

    def interrupted(self: runs.Run) -> None:
        if next(validations) == 2 * DONE:
            signal.raise_signal(signal.SIGINT)
        validate(self)

    monkeypatch.setattr(runs.Run, "validate", interrupted)
    call = ["--seeds", "1", "--folder", str(tmp_path / "networks"), "--output", str(tmp_path)]
    insertion.main(call)
    assert "stopped" in capsys.readouterr().out
    assert not (tmp_path / "insertion.md").exists()
    insertion.main(call)
    assert next(validations) == 2 * (1 + len(INSERTED) * len(SHARES))  # what was done is not evaluated again
    text = (tmp_path / "insertion.md").read_text()
    assert all(f"## Trained on with {name}" in text for name in SHARES.values())
    for block in INSERTED:
        assert text.count(f"| {block} | ") == len(SHARES)
    found = json.loads((tmp_path / "insertion.json").read_text())
    assert [result["block"] for result in found] == [BEFORE, *INSERTED, *INSERTED]
    assert (tmp_path / "insertion.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("short_task")
def test_an_interruption_between_two_trainings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(insertion, "evaluate", interrupted)
    insertion.main(["--folder", str(tmp_path / "networks"), "--output", str(tmp_path)])
    assert "stopped" in capsys.readouterr().out
    assert not (tmp_path / "insertion.md").exists()


def test_the_committed_page_is_of_the_committed_scores() -> None:
    found = [Result(**result) for result in json.loads((FOLDER / "insertion.json").read_text())]
    made, committed = report(found).splitlines(), (FOLDER / "insertion.md").read_text().splitlines()
    assert [line for line in made if line.startswith(("|", "is "))] == [
        line for line in committed if line.startswith(("|", "is "))
    ]


def test_a_wrong_number_of_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        insertion.main(["--seeds", "0"])
    assert "--seeds must be at least 1; got 0" in capsys.readouterr().err
