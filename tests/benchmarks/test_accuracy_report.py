"""The tables and pictures that are made of the sweep's rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.accuracy import __main__ as accuracy
from benchmarks.accuracy.score_tables import readme_table
from benchmarks.accuracy.sweep_runs import FOLDER, ROWS, read_rows
from benchmarks.accuracy.tasks import EVALUATED_STAGES, STAGES
from tests.benchmarks import made_up_rows
from tests.benchmarks.made_up_rows import COSTS, row


def test_a_row_is_the_mean_and_the_deviation_over_seeds_beside_the_cost() -> None:
    text, pictures = accuracy.report(made_up_rows.ROWS, COSTS)
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
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made_up_rows.ROWS))
    (tmp_path / "costs.json").write_text(json.dumps(COSTS))
    readme = tmp_path / "README.md"
    readme.write_text("\n".join(["a", *accuracy.README_MARKERS, "b"]))
    accuracy.main(["--results", str(tmp_path), "--readme", str(readme)])
    assert (tmp_path / "report.md").read_text() == accuracy.report(made_up_rows.ROWS, COSTS)[0]
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert "| Non-local | 60.0 ± 10.0 | 60.0 ± 10.0 | 60.0 ± 10.0 |" in readme.read_text()
    with pytest.raises(SystemExit) as error:
        accuracy.main(["--results", str(tmp_path / "nowhere")])
    assert error.value.code == 2


def test_the_committed_report_is_of_the_committed_rows() -> None:
    rows, costs = read_rows(ROWS), json.loads((FOLDER / "costs.json").read_text())
    assert (FOLDER / "report.md").read_text() == accuracy.report(rows, costs)[0]
    begin, end = accuracy.README_MARKERS
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert readme.partition(begin)[2].partition(end)[0].strip() == readme_table(rows).strip()
