"""The sweep: its runs, the rows that they give, and how it is stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

from benchmarks.accuracy import sweep, tasks
from benchmarks.accuracy.sweep_runs import Run, add_row, missing_runs, planned_runs, read_rows, run_of
from benchmarks.accuracy.tasks import ABLATIONS, FULL_SIZE_RATES, LEADING, RECOMMENDED, TASKS, TWO_RATES, Task
from benchmarks.blocks import DEFAULTS, GAMMAS, GRADIENTS, TRAINED
from examples._common import runs
from examples._common.evaluation import evaluate, mean_iou
from examples._common.files import load_checkpoint
from examples._common.recipe import Recipe
from examples._common.samples import normalisation
from examples.digit_scenes import DigitScenes
from tests.benchmarks.made_up_rows import row
from tests.trouble import held_elsewhere


def test_rows_are_added_in_order_and_what_is_missing_is_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    assert missing_runs(path, "") == planned_runs()
    add_row(row("mobilenet", "no block", 1, 0.5), path)
    add_row(row("digits", "Non-local", 0, 0.5), path)
    assert [r["task"] for r in read_rows(path)] == ["digits", "mobilenet"]
    missing = missing_runs(path, "digits")
    assert Run("digits", "Non-local", 0, 0.4) not in missing
    assert len(missing) == 5 * (len(TRAINED) + len(LEADING)) - 1


def test_the_plan_is_a_fair_comparison_wherever_it_stops() -> None:
    runs = planned_runs()
    assert len(runs) == len(set(runs))
    first = runs[: 2 * len(LEADING)]
    assert [run.block for run in first] == 2 * list(LEADING)
    assert {(run.task, run.seed) for run in first} == {("digits", 0), ("mobilenet", 0)}
    done: Counter[tuple[str, float, str]] = Counter()
    for run in runs:
        if run.block in LEADING and run.task in TWO_RATES:
            done[run.task, run.lr, run.block] += 1
            counts = [done[run.task, run.lr, block] for block in LEADING]
            assert max(counts) - min(counts) <= 1
    for name, task in TASKS.items():
        for block in task.blocks:
            own = [run.seed for run in runs if run[:2] == (name, block) and run.lr == task.recipe.lr]
            assert sorted(own) == list(range(task.seeds))
    halves = {(run.task, run.block) for run in runs if run.lr == TASKS[run.task].recipe.lr / 2}
    assert halves == {(task, block) for task in TWO_RATES for block in LEADING}
    assert [run.lr for run in runs if str(run).startswith("camvid-full/no block/0/")] == list(FULL_SIZE_RATES)


def test_each_unit_starts_with_its_gradient_and_weight() -> None:
    starts = {}
    for name, make in TRAINED.items():
        if name.startswith("EMAUnit"):
            unit = make(16)
            weights = unit.conv2[1].weight.unique().tolist()
            assert len(weights) == 1
            starts[name] = (unit.gradient, round(weights[0], 6))
    assert starts[DEFAULTS] == ("none", 1)
    assert starts[RECOMMENDED] == ("all", 0.25)
    assert sorted(starts.values()) == sorted((gradient, gamma) for gradient in GRADIENTS for gamma in GAMMAS)
    for name, make in ABLATIONS.items():
        unit = make(16)
        assert (unit.gradient, unit.layer_scale) == ("all", 0.25), name
    for name, gain in (("DANet (PAM + CAM)", 0), ("DANet, gain from 1", 1)):
        danet = TRAINED[name](16)
        assert danet.position.gamma == danet.channel.gamma == gain


def edited(change: Callable[[dict[str, Any]], object], *made: Any) -> str:
    made_up = row(*(made or ("digits", "Non-local", 0, 0.5)))
    change(made_up)
    return json.dumps(made_up)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "must have a row of a run in each line; got '' in line 2"),
        ("5", "must have a row of a run in each line; got '5' in line 2"),
        (edited(lambda row: None)[:-9], r"must have a row of a run in each line; got .* in line 2"),
        *(
            (edited(change), r"must have a row of a run in each line; got .* in line 2")
            for change in (
                lambda row: row.pop("recipe"),
                lambda row: row.pop("test"),
                lambda row: row.pop("test_unmarked"),
                lambda row: row.update(test=[0.5]),
                lambda row: row.update(test=[0.5, 50.0]),
                lambda row: row.update(test=["0.5", 0.5]),
                lambda row: row.update(val=[]),
                lambda row: row.update(task=[]),
                lambda row: row.pop("commit"),
                lambda row: row.update(torch=2.15),
                lambda row: row.pop("gradients"),
                lambda row: row.update(gradients={}),
                lambda row: row["gradients"]["4"].pop("stages"),
                lambda row: row["gradients"]["4"].update(stages=[float("nan")]),
            )
        ),
        (edited(lambda row: row.pop("test_by_stages"), "mobilenet", "T = 1", 0, 0.5), "must have a row of a run in"),
        (
            edited(lambda row: row["gradients"]["4"].pop("branch"), "digits", DEFAULTS, 0, 0.5),
            "must have a row of a run",
        ),
        *(
            (edited(change), rf"must have rows of planned runs, see --list; got {run} in line 2")
            for change, run in (
                (lambda row: row.update(block="Nonlocal"), "digits/Nonlocal/0/lr 0.4"),
                (lambda row: row.update(seed="0x"), "digits/Non-local/0x/lr 0.4"),
                (lambda row: row["recipe"].update(lr=0.3), "digits/Non-local/0/lr 0.3"),
                (lambda row: row.update(seed=5), "digits/Non-local/5/lr 0.4"),
            )
        ),
        (edited(lambda row: row.update(seed=1)), "digits/Non-local/1/lr 0.4 was trained by another"),
        (
            edited(lambda row: None, "digits", "no block", 0, 0.4),
            "one row of each run; line 2 has digits/no block/0/lr 0.4 again",
        ),
    ],
)
def test_a_results_file_that_was_edited_is_refused_by_line(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    add_row(row("digits", "no block", 0, 0.5), path)
    first = path.read_text()
    path.write_text(f"{first}{line}\n")
    with pytest.raises(ValueError, match=rf"^{path} must have .*{message.removeprefix('must have ')}"):
        read_rows(path)


def test_a_results_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=rf"^cannot read the results {path}: .*utf-8"):
        read_rows(path)


def test_two_sweeps_do_not_share_a_results_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "run_all", lambda runs, args: ran.append(len(runs)))
    ran: list[int] = []
    results, link = tmp_path / "runs.jsonl", tmp_path / "link.jsonl"
    add_row(row("digits", "no block", 0, 0.5), results)
    link.symlink_to(results)
    (tmp_path / ".runs.jsonl.00ff.part").write_text("of one that was killed")
    command = ["--only", "digits/no block/", "--results"]
    with held_elsewhere(tmp_path / ".runs.jsonl.lock"):
        for path in (results, link):
            with pytest.raises(SystemExit) as error:
                sweep.main([*command, str(path)])
            assert error.value.code == 2
            assert capsys.readouterr().err == f"another process is writing {path}: one at a time\n"
        sweep.main(["--list", *command, str(results)])
        assert capsys.readouterr().out.splitlines()[:2] == [
            "done   digits/no block/0/lr 0.4",
            "to do  digits/no block/1/lr 0.4",
        ]
    sweep.main([*command, str(link)])
    assert ran == [9]
    add_row(row("digits", "no block", 1, 0.5), link)
    assert len(read_rows(results)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.jsonl", "runs.jsonl"]


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
    monkeypatch.setattr(runs, "evaluate", look)
    recipe = Recipe(steps=8, batch=2, lr=0.3, evaluate_every=2)
    tiny = Task(
        network, lambda net: (net[:1], net[1]), data, (64, 64), (64, 64), normalisation, recipe, TRAINED, seeds=8
    )
    monkeypatch.setitem(TASKS, "digits", tiny)
    folder = tmp_path / "run"
    made = sweep.train_run(Run("digits", RECOMMENDED, 7, 0.15), None, folder, "cpu", torch.get_num_threads())
    assert looked_at == [("val", True)] * 4 + [("test", True), ("test", False)]
    assert (made["task"], made["block"], made["seed"], made["recipe"]["seed"]) == ("digits", RECOMMENDED, 7, 7)
    assert run_of(made).lr == made["recipe"]["lr"] == 0.15
    assert load_checkpoint(folder / "last.pt")["recipe"]["lr"] == 0.15
    assert json.loads(json.dumps(made))["val"].keys() == {"2", "4", "6", "8"}
    assert made["gradients"].keys() == {1, 2, 4, 8}
    scores = {step: mean_iou(iou) for step, iou in made["val"].items()}
    assert made["best_step"] == max(scores, key=scores.get)
    model = network(TRAINED[RECOMMENDED])
    model.load_state_dict(load_checkpoint(folder / "best.pt")["model"])
    assert made["test"] == evaluate(model, data(None, "test")).tolist()
    monkeypatch.setattr(sweep, "COMMIT", "another")
    with pytest.raises(ValueError, match=r"last\.pt is of a run with commit = \w+.*; got commit = another"):
        sweep.train_run(Run("digits", RECOMMENDED, 7, 0.15), None, folder, "cpu", torch.get_num_threads())
    monkeypatch.setattr(sweep, "COMMIT", made["commit"])
    again = sweep.train_run(Run("digits", RECOMMENDED, 7, 0.15), None, folder, "cpu", torch.get_num_threads())
    assert again["gradients"] == made["gradients"]  # of a run that was done, and had no row yet


def test_ctrl_c_is_heard_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def network(make_block: Any) -> nn.Module:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it was not heard")

    monkeypatch.setitem(TASKS, "digits", TASKS["digits"]._replace(network=network))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the processes of the pool
    try:
        assert sweep.train_run(Run("digits", "no block", 0, 0.4), None, tmp_path, "cpu", 1) is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


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
        return None if run.seed == interrupted else row(*run[:3], 0.5, run.lr / TASKS[run.task].recipe.lr)

    monkeypatch.setattr(sweep, "ProcessPoolExecutor", Threads)
    monkeypatch.setattr(sweep, "train_run", fake)
    results, folder = tmp_path / "new" / "runs.jsonl", tmp_path / "folder"
    command = ["--only", "digits/Hamburger", "--processes", "1", "--results", str(results), "--folder", str(folder)]
    interrupted = None
    with pytest.raises(SystemExit) as error:
        sweep.main(command)
    assert error.value.code == 2
    assert capsys.readouterr().err.endswith("digits/Hamburger/1/lr 0.4: the loss is nan\n")
    assert [r["seed"] for r in read_rows(results)] == [0, 2, 3, 4]
    assert list((folder / "digits" / "Hamburger").glob("*/*")) == [folder / "digits" / "Hamburger" / "1" / "lr-0.4"]
    results.unlink()
    shutil.rmtree(folder)
    interrupted = 0
    sweep.main(command)
    assert "stopped; the same command goes on" in capsys.readouterr().out
    assert not results.exists()
    assert (folder / "digits" / "Hamburger" / "0" / "lr-0.4").is_dir()


def test_a_process_that_is_killed_ends_the_sweep_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(Threads):
        def submit(self, train: Callable[..., Any], run: Run, *others: Any) -> Any:
            if run.seed == 3:
                raise BrokenProcessPool
            return super().submit(train, run, *others)

    def fake(run: Run, root: Path | None, folder: Path, *others: Any) -> dict[str, Any]:
        folder.mkdir(parents=True)
        return row(*run[:3], 0.5)

    monkeypatch.setattr(sweep, "ProcessPoolExecutor", Broken)
    monkeypatch.setattr(sweep, "train_run", fake)
    command = ["--only", "digits/Hamburger", "--results", str(tmp_path / "runs.jsonl"), "--folder", str(tmp_path)]
    with pytest.raises(SystemExit) as error:
        sweep.main([*command, "--processes", "1"])
    assert error.value.code == 2
    message = "a process was killed, and 2 runs have not begun: the same command begins them\n"
    assert capsys.readouterr().err.endswith(message)
    assert [r["seed"] for r in read_rows(tmp_path / "runs.jsonl")] == [0, 1, 2]


@pytest.fixture
def without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """MobileNetV2 with random weights: those of ImageNet are in a package that tests do without."""
    monkeypatch.setattr(tasks, "load_imagenet", lambda features: None)


@pytest.mark.usefixtures("without_weights")
@pytest.mark.parametrize(("task", "block"), [(name, block) for name, task in TASKS.items() for block in task.blocks])
def test_every_block_fits_its_networks(task: str, block: str) -> None:
    network = TASKS[task].network(TASKS[task].blocks[block]).eval()
    size = (64, 64) if task == "digits" else (48, 64)
    classes = 2 if task == "digits" else 11
    with torch.no_grad():
        assert network(torch.randn(1, 3, *size)).shape == (1, classes, *size)


@pytest.mark.usefixtures("without_weights")
@pytest.mark.parametrize(("task", "stages", "stride"), [("mobilenet", 14, 8), ("camvid-full", 19, 16)])
def test_mobilenet_ends_where_it_should_and_its_dilated_stages_see_what_they_saw(
    task: str, stages: int, stride: int
) -> None:
    features = TASKS[task].network(nn.Identity).backbone.eval()
    whole = mobilenet_v2().features[:stages].eval()
    whole.load_state_dict(features.state_dict())
    image = torch.randn(1, 3, 160, 192)
    with torch.no_grad():
        dense, sparse = features(image), whole(image)
    assert dense.shape[-2:] == (160 // stride, 192 // stride)
    largest = sparse.abs().max()  # far below 1 with random weights
    torch.testing.assert_close(dense[..., ::2, ::2] / largest, sparse / largest, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("without_weights")
def test_mistakes_show_before_anything_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--only", "camvid-full"], "need --root, the folder of CamVid"),
        (["--only", "zzz"], "see --list; got 'zzz'"),
        (["--processes", "0"], "--processes must be at least 1; got 0"),
    ):
        with pytest.raises(SystemExit) as error:
            sweep.main(["--results", str(tmp_path / "runs.jsonl"), *arguments])
        assert error.value.code == 2
        assert message in capsys.readouterr().err
    sweep.main(["--list", "--results", str(tmp_path / "runs.jsonl")])
    assert capsys.readouterr().out.splitlines() == [f"to do  {run}" for run in planned_runs()]
