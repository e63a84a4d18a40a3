"""The sweep's rows and what is made of them."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import accuracy, sweep
from benchmarks.sweep import (
    ABLATIONS,
    BLOCKS,
    EVALUATED_STAGES,
    STAGES,
    TASKS,
    Run,
    Task,
    add_row,
    missing_runs,
    read_rows,
)
from examples.digit_scenes import DigitScenes
from examples.emanet import train
from examples.emanet.checkpoint import load_checkpoint
from examples.emanet.data import normalisation
from examples.emanet.evaluate import evaluate, mean_iou
from examples.emanet.train import Recipe


def row(task: str, block: str, seed: int, score: float) -> dict[str, Any]:
    classes = 2 if task == "digits" else 11
    test = [score] * classes if task == "digits" else [score, float("nan"), *[score] * (classes - 2)]
    made = {"task": task, "block": block, "seed": seed, "test": test, "val": {"10": test, "20": test}}
    if task == "mobilenet":
        made["test_by_stages"] = {str(t): [score + t / 100] * classes for t in EVALUATED_STAGES}
    recipe = asdict(replace(TASKS[task].recipe, seed=seed))
    return {**made, "test_unmarked": [score / 2] * classes, "recipe": recipe}


ROWS = [row(task, block, seed, 0.5 + seed / 10) for task in TASKS for block in BLOCKS for seed in (0, 1, 2)]
ROWS += [row("mobilenet", block, 0, 0.4) for block in ABLATIONS]
TIMES = {
    "forward": {"median": 0.01, "quartiles": [0.009, 0.012]},
    "training step": {"median": 0.2, "quartiles": [0.1, 0.3]},
}
COST = {"parameters": 1_500_000, "macs": 2_000_000_000, **TIMES}
COSTS = {
    "environment": {"machine": "a machine", "device": "cpu", "threads": 2, "torch": "2.15"},
    "networks": {task: {"blocks": dict.fromkeys(BLOCKS, COST)} for task in TASKS},
}


def test_a_row_is_the_mean_and_the_deviation_over_seeds_beside_the_cost() -> None:
    text, pictures = accuracy.report(ROWS, COSTS)
    assert text.count("| Non-local | 60.0 ± 10.0 | 3 | 1.500 M | 2.000 | 10.0 [9.0–12.0] | 200 [100–300] |") == 2
    assert (
        "| Non-local | 60.0 ± 10.0 | 30.0 ± 5.0 | 60.0 ± 10.0 | 3 | 1.500 M | 2.000 | 10.0 [9.0–12.0] | 200 [100–300] |"
        in text
    )
    assert pictures.keys() == {"digits.png", "mobilenet.png", "resnet18.png", "bases.png", "stages.png"}
    heat = pictures["stages.png"].axes[0].images[0].get_array()
    assert heat.shape == (len(STAGES), len(EVALUATED_STAGES))
    assert "the same recipe; seeds: 0." in text  # the only one that all numbers of stages have
    assert heat[2].tolist() == pytest.approx([50 + t for t in EVALUATED_STAGES])
    assert heat[0].tolist() == pytest.approx([40 + t for t in EVALUATED_STAGES])


def test_what_has_not_run_yet_is_said_or_left_out() -> None:
    one = [row("digits", "Hamburger", 0, 0.5)]
    text, pictures = accuracy.report(one, COSTS)
    assert "| Hamburger | 50.0 | 25.0 | 50.0 | 1 |" in text
    assert "| Non-local | – |" in text
    assert pictures.keys() == {"digits.png"}
    assert "CamVid, ResNet-18" not in text


def test_main_writes_the_report_and_the_readmes_table(tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    (tmp_path / "costs.json").write_text(json.dumps(COSTS))
    readme = tmp_path / "README.md"
    readme.write_text("\n".join(["a", *accuracy.README_MARKERS, "b"]))
    accuracy.main(["--results", str(tmp_path), "--readme", str(readme)])
    assert (tmp_path / "report.md").read_text() == accuracy.report(ROWS, COSTS)[0]
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert "| Non-local | 60.0 ± 10.0 | 60.0 ± 10.0 | 60.0 ± 10.0 |" in readme.read_text()
    with pytest.raises(SystemExit) as error:
        accuracy.main(["--results", str(tmp_path / "nowhere")])
    assert error.value.code == 2


def test_the_committed_report_is_of_the_committed_rows() -> None:
    rows, costs = read_rows(sweep.RESULTS), json.loads((accuracy.FOLDER / "costs.json").read_text())
    assert (accuracy.FOLDER / "report.md").read_text() == accuracy.report(rows, costs)[0]
    begin, end = accuracy.README_MARKERS
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert readme.partition(begin)[2].partition(end)[0].strip() == accuracy.readme_table(rows).strip()


def test_rows_are_added_in_order_and_what_is_missing_is_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    assert len(missing_runs(path, "")) == len(set(missing_runs(path, ""))) == 3 * (3 * len(BLOCKS) + len(ABLATIONS))
    add_row(row("mobilenet", "no block", 1, 0.5), path)
    add_row(row("digits", "Non-local", 0, 0.5), path)
    assert [r["task"] for r in read_rows(path)] == ["digits", "mobilenet"]
    missing = missing_runs(path, "digits")
    assert Run("digits", "Non-local", 0) not in missing
    assert len(missing) == 3 * len(BLOCKS) - 1
    path.write_text(path.read_text() + '{"task": "digi')
    with pytest.raises(ValueError, match=r"runs.jsonl must have a row of a run in each line; got '{\"task\": \"digi'"):
        read_rows(path)
    other = row("digits", "Non-local", 0, 0.5)
    other["recipe"]["lr"] = 9.0
    path.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="digits/Non-local/0 was trained by another"):
        read_rows(path)


def test_a_run_is_chosen_on_val_and_looks_at_test_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def network(make_block: Any) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), make_block(8), nn.Conv2d(8, 2, 1))

    def data(root: Path | None, split: str) -> DigitScenes:
        return DigitScenes(split, 4)

    def look(model: nn.Module, dataset: DigitScenes, *others: Any) -> Tensor:
        looked_at.append((dataset.split, dataset.is_marked))
        return evaluate(model, dataset, *others)

    looked_at: list[tuple[str, bool]] = []
    monkeypatch.setattr(sweep, "evaluate", look)
    monkeypatch.setattr(train, "evaluate", look)
    recipe = Recipe(steps=8, batch=2, lr=0.3, evaluate_every=2)
    tiny = Task(network, data, (64, 64), (64, 64), normalisation, recipe, BLOCKS)
    monkeypatch.setitem(sweep.TASKS, "digits", tiny)
    folder = tmp_path / "run"
    made = sweep.train_run(Run("digits", "EMAUnit, all", 7), None, folder, "cpu", torch.get_num_threads())
    assert looked_at == [("val", True)] * 4 + [("test", True), ("test", False)]
    assert (made["task"], made["block"], made["seed"], made["recipe"]["seed"]) == ("digits", "EMAUnit, all", 7, 7)
    assert json.loads(json.dumps(made))["val"].keys() == {"2", "4", "6", "8"}
    scores = {step: mean_iou(iou) for step, iou in made["val"].items()}
    assert made["best_step"] == max(scores, key=scores.get)
    model = network(BLOCKS["EMAUnit, all"])
    model.load_state_dict(load_checkpoint(folder / "best.pt")["model"])
    assert made["test"] == evaluate(model, data(None, "test")).tolist()


class Threads(ThreadPoolExecutor):
    """A pool that sees what a test has put in the place of functions, as processes of their own do not."""

    def __init__(self, processes: int, *context: Any, **others: Any) -> None:
        super().__init__(processes)


def test_a_run_that_fails_or_is_interrupted_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(run: Run, root: Path | None, folder: Path, *others: Any) -> dict[str, Any] | None:
        folder.mkdir(parents=True)
        if run.seed == 1:
            raise ValueError("the loss is nan")
        return None if run.seed == interrupted else row(*run, 0.5)

    monkeypatch.setattr(sweep, "ProcessPoolExecutor", Threads)
    monkeypatch.setattr(sweep, "train_run", fake)
    results, folder = tmp_path / "new" / "runs.jsonl", tmp_path / "folder"
    command = ["--only", "digits/no block", "--processes", "1", "--results", str(results), "--folder", str(folder)]
    interrupted = None
    with pytest.raises(SystemExit) as error:
        sweep.main(command)
    assert error.value.code == 2
    assert capsys.readouterr().err.endswith("digits/no block/1: the loss is nan\n")
    assert [r["seed"] for r in read_rows(results)] == [0, 2]
    assert [path.name for path in (folder / "digits" / "no-block").iterdir()] == ["1"]
    results.unlink()
    shutil.rmtree(folder)
    interrupted = 0
    sweep.main(command)
    assert "stopped; the same command goes on" in capsys.readouterr().out
    assert not results.exists()
    assert (folder / "digits" / "no-block" / "0").is_dir()


@pytest.mark.parametrize("task", ["digits", "resnet18"])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_fits_every_network(task: str, block: str) -> None:
    network = TASKS[task].network(BLOCKS[block]).eval()
    size = (64, 64) if task == "digits" else (48, 64)
    classes = 2 if task == "digits" else 11
    with torch.no_grad():
        assert network(torch.randn(1, 3, *size)).shape == (1, classes, *size)


def test_mistakes_show_before_anything_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--only", "resnet18"], "need --root, the folder of CamVid"),
        (["--only", "zzz"], "see --list; got 'zzz'"),
        (["--processes", "0"], "--processes must be at least 1; got 0"),
    ):
        with pytest.raises(SystemExit) as error:
            sweep.main(["--results", str(tmp_path / "runs.jsonl"), *arguments])
        assert error.value.code == 2
        assert message in capsys.readouterr().err
    sweep.main(["--list", "--only", "digits"])
    assert len(capsys.readouterr().out.splitlines()) == 3 * (3 * len(BLOCKS) + len(ABLATIONS))
