"""The tables and pictures that are made of the sweep's rows."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest

from benchmarks.accuracy import __main__ as accuracy
from benchmarks.accuracy.score_tables import readme_table
from benchmarks.accuracy.sweep_runs import FOLDER, ROWS, planned_runs, read_rows
from benchmarks.accuracy.tasks import EVALUATED_STAGES, RECOMMENDED, RUN_OF_STAGES, TASKS, TWO_RATES
from benchmarks.blocks import GAMMAS, GRADIENTS, unit_name
from examples.emanet.data import CAMVID_NAMES
from tests.benchmarks import made_up_rows
from tests.benchmarks.made_up_rows import COSTS, row


def test_a_row_is_the_mean_and_the_deviation_over_seeds_beside_the_cost() -> None:
    text, pictures = accuracy.report(made_up_rows.ROWS, COSTS)
    assert text.count("| Non-local | 60.0 ± 10.0 | 3 | 1.500 M | 2.000 | 10.0 [9.0–12.0] | 200 [100–300] |") == 2
    assert (
        "| Non-local | 70.0 ± 15.8 | 35.0 ± 7.9 | 70.0 ± 15.8 | 5 | 1.500 M | 2.000 | 10.0 [9.0–12.0] | 200 [100–300] |"
        in text
    )
    assert "| EMAUnit, last, γ 0.1 | 70.0 ± 15.8 | 60.0 ± 10.0 | – |" in text
    curves = {f"{task}.png" for task in TASKS}
    starts = {f"{task}-{kind}.png" for task in TWO_RATES for kind in ("starts", "gradients")}
    assert pictures.keys() == curves | starts | {"mobilenet-small.png", "bases.png", "stages.png"}
    heat = pictures["stages.png"].axes[0].images[0].get_array()
    assert heat.shape == (len(RUN_OF_STAGES), len(EVALUATED_STAGES))
    assert text.count("the same recipe; seeds: 0, 1, 2.") == 2
    ablated = {block: f"{100 * score:.1f} ± 0.0" for block, score in made_up_rows.ABLATED.items()}
    for block, score in (ablated | {"K = 64": "60.0 ± 10.0", "T = 3": "60.0 ± 10.0"}).items():
        assert f"| {block} | {score} |" in text
    assert heat[2].tolist() == pytest.approx([60 + t for t in EVALUATED_STAGES])
    assert heat[0].tolist() == pytest.approx([100 * made_up_rows.ABLATED["T = 1"] + t for t in EVALUATED_STAGES])


def test_what_has_not_run_yet_is_said_or_left_out() -> None:
    one = [row("digits", "Hamburger", 0, 0.5)]
    text, pictures = accuracy.report(one, COSTS)
    assert "| Hamburger | 50.0 | 25.0 | 50.0 | 1 |" in text
    assert "| Hamburger | 50.0 (1 seed) |" in text
    assert f"1 of the {len(planned_runs())} planned runs are done." in text
    assert [line for line in readme_table(one).splitlines() if line.startswith("| ")][2:] == [
        "| Hamburger | 50.0 (1 seed) |"
    ]
    assert "| Non-local | – |" in text
    assert pictures.keys() == {"digits.png", "digits-starts.png", "digits-gradients.png"}
    assert "CamVid" not in text.partition("## Every block")[2]
    assert "Half the learning rate" not in text


def test_start_and_gradient_are_a_table_and_a_line_for_each_gradient() -> None:
    rows = [
        row("digits", unit_name(gradient, gamma), seed, base + gamma / 10 + seed / 100)
        for gradient, base in zip(GRADIENTS, (0.3, 0.5, 0.7), strict=True)
        for gamma in GAMMAS
        for seed in range(5)
        if (gradient, gamma) != ("all", 1)
    ]
    rows += [row("digits", "no block", seed, 0.3 + seed / 100) for seed in range(2)]
    text, pictures = accuracy.report(rows, COSTS)
    assert "| gradient | γ 0 | γ 0.1 | γ 0.25 | γ 0.5 | γ 1 |" in text
    assert "| `last` | 52.0 ± 1.6 | 53.0 ± 1.6 | 54.5 ± 1.6 | 57.0 ± 1.6 | 62.0 ± 1.6 |" in text
    assert "| `all` | 72.0 ± 1.6 | 73.0 ± 1.6 | 74.5 ± 1.6 | 77.0 ± 1.6 | – |" in text
    assert (
        "| `last` | 26.0 ± 0.8 | 26.5 ± 0.8 | 27.3 ± 0.8 | 28.5 ± 0.8 | 31.0 ± 0.8 |"
        in text.partition("unmarked, where")[2]
    )
    assert "| EMAUnit, defaults | 42.0 ± 1.6 |" in text
    ax = pictures["digits-starts.png"].axes[0]
    none, last, every = (container.lines for container in ax.containers)
    assert list(none[0].get_ydata()) == pytest.approx([32, 33, 34.5, 37, 42])
    assert list(last[0].get_xdata()) == pytest.approx(GAMMAS)
    assert len(every[0].get_xdata()) == 4
    bar = none[2][0].get_segments()[0][:, 1]
    assert bar.tolist() == pytest.approx([32 - 1.5811, 32 + 1.5811], abs=1e-3)
    level = next(line for line in ax.lines if line.get_label() == "no block")
    assert list(level.get_ydata()) == pytest.approx([30.5, 30.5])


def test_gradients_and_small_classes_are_lines_over_the_steps() -> None:
    rows = [row("mobilenet", RECOMMENDED, seed, 0.2 + seed / 5) for seed in range(2)]  # 0.2 and 0.4
    rows[0]["gradients"]["4"]["branch"] = [0.0]
    rows[1]["gradients"]["4"]["branch"] = [0.0]  # not on a logarithmic axis
    for made in rows:
        made["gradients"]["16"]["stages"] = [0.0, 0.0]
        made["val"]["10"][CAMVID_NAMES.index("pedestrian")] += 0.1
    lonely = row("mobilenet", RECOMMENDED, 2, 0.9)  # no block lacks its seed
    rows += [row("mobilenet", "no block", seed, 0.1) for seed in range(2)] + [lonely]
    text, pictures = accuracy.report(rows, COSTS)
    assert pictures["mobilenet-small.png"].get_suptitle() == "seeds: 0, 1"
    assert "| `last` | – | – | – | – | – |\n| `all` | – | – | 0.24 | – | – |" in text  # (0.3 · 27/31 + 0.45) / 3
    ratio, norm, by_stage = pictures["mobilenet-gradients.png"].axes
    assert [list(line) for line in zip(*ratio.lines[0].get_data(), strict=True)] == [
        [step, pytest.approx(0.15)] for step in (1, 2, 8, 16)
    ]
    assert list(norm.lines[1].get_xdata()) == [1, 2, 4, 8, 16]
    assert list(norm.lines[1].get_ydata()) == pytest.approx([0.3 * 5**0.5] * 4 + [0])
    assert [list(line) for line in by_stage.lines[1].get_data()] == [
        [1, 2],
        pytest.approx([0.3 * 15 / 31, 0.6 * 15 / 31]),
    ]
    sign, pedestrian, _ = pictures["mobilenet-small.png"].axes
    assert list(sign.lines[1].get_ydata()) == pytest.approx([30, 30])
    assert list(pedestrian.lines[1].get_ydata()) == pytest.approx([40, 30])


def test_rows_at_another_learning_rate_stand_in_tables_of_their_own() -> None:
    rows = [row("digits", "Non-local", seed, 0.6) for seed in range(5)]
    rows += [row("digits", "Non-local", seed, 0.8, share=0.5) for seed in range(5)]
    rows += [row("camvid-full", "no block", 0, score, share) for score, share in ((0.6, 1), (0.5, 2))]
    text, _ = accuracy.report(rows, COSTS)
    assert "| Non-local | 60.0 ± 0.0 | – |" in text.partition("## Every block")[2]
    assert "lr 0.4 | digit scenes, IoU of the wanted digits, lr 0.2 |" in text
    assert "| Non-local | 60.0 ± 0.0 | 80.0 ± 0.0 | – | – |" in text.partition("## Half the learning rate")[2]
    assert "| 0.02 | 60.0 |\n| 0.04 | 50.0 |\n| 0.08 | – |" in text
    assert "| no block | – | 60.0 (1 seed) |" in text


def test_rows_of_several_commits_or_versions_are_said_to_be() -> None:
    rows = [row("digits", "no block", seed, 0.5) for seed in range(3)]
    warning = "They are not of one commit and one PyTorch"
    text, _ = accuracy.report([*rows, row("mobilenet", "no block", 0, 0.5) | {"commit": "another"}], COSTS)
    assert "Rows: 1 of commit another with PyTorch 2.15." in text  # what is compared is of one task
    assert "Rows: 3 of commit 0123456789 with PyTorch 2.15." in text
    assert warning not in text
    for name in ("commit", "torch"):
        text, _ = accuracy.report([*rows[:2], rows[2] | {name: "9.9"}], COSTS)
        assert warning in text
    assert "Rows: 2 of commit 0123456789 with PyTorch 2.15; 1 of commit 0123456789 with PyTorch 9.9." in text


def test_main_writes_the_report_and_the_readmes_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made_up_rows.ROWS))
    (tmp_path / "costs.json").write_text(json.dumps(COSTS))
    readme = tmp_path / "README.md"
    readme.write_text("\n".join(["a", *accuracy.README_MARKERS, "b"]))
    accuracy.main(["--results", str(tmp_path), "--readme", str(readme)])
    assert (tmp_path / "report.md").read_text() == accuracy.report(made_up_rows.ROWS, COSTS)[0]
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert "| Non-local | 70.0 ± 15.8 | 60.0 ± 10.0 | 60.0 ± 10.0 |" in readme.read_text()
    assert "EMAUnit, last" not in readme.read_text()
    with pytest.raises(SystemExit) as error:
        accuracy.main(["--results", str(tmp_path / "nowhere")])
    assert error.value.code == 2
    old = copy.deepcopy(COSTS)
    del old["networks"]["mobilenet"]["blocks"]["Hamburger"]
    for costs, got in ((old, "no block, Non-local, DANet"), ({"networks": {"digits": {}}}, "none"), ({}, "none")):
        (tmp_path / "costs.json").write_text(json.dumps(costs))
        with pytest.raises(SystemExit):
            accuracy.main(["--results", str(tmp_path)])
        assert re.search(rf"in \w+; got {got}.*: --measure makes it again", capsys.readouterr().err)


def test_the_committed_report_is_of_the_committed_rows() -> None:
    rows, costs = read_rows(ROWS), json.loads((FOLDER / "costs.json").read_text())
    assert (FOLDER / "report.md").read_text() == accuracy.report(rows, costs)[0]
    begin, end = accuracy.README_MARKERS
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert readme.partition(begin)[2].partition(end)[0].strip() == readme_table(rows).strip()
