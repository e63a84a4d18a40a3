"""The cost report from end to end, at sizes where it takes seconds."""

import json
from pathlib import Path

import pytest

from benchmarks.blocks import BLOCKS
from benchmarks.costs import __main__ as report
from benchmarks.costs import cost_tables, paper_costs
from benchmarks.costs.measure_costs import measure_costs
from benchmarks.costs.sizes import Grid, Sizes
from benchmarks.reporting import RESULTS, update_readme

TINY = Sizes(
    channels=(16,),
    sides=(8,),
    batches=(1,),
    minutes=1,
    table=(1, 16, 8, 8),
    large_side=16,
    growth=(6, 8, 10),
    growth_channels=16,
    seconds=0,
    growth_seconds=0,
    slowest=1,
    grid=Grid(sides=(4, 7), batches=(1,), channels=(16,), token_channels=(), precisions=("float32",), seconds=0),
)


@pytest.fixture(scope="module")
def results():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BLOCKS, "CAM", BLOCKS["CAM"]._replace(parameters=lambda c: 2))
        patch.setattr(paper_costs, "count", lambda: [])  # has a test of its own
        return json.loads(json.dumps(measure_costs(TINY, "cpu", 1e9, "command")))


def test_a_wrong_block_is_withheld_and_the_others_are_reported(results):
    text = cost_tables.markdown(results)
    assert "**Withheld: CAM**, because its parameters are 1, its formula's 2." in text
    measured = [name for name in BLOCKS if name != "CAM"]
    assert list(results["costs"][0]["blocks"]) == measured
    assert list(results["growth"]["training step"]) == measured
    assert "| CAM |" not in text
    for name in measured:
        assert f"\n| {name} | {BLOCKS[name].parameters(16):,} | " in text


def test_every_target_is_shown_with_what_it_is(results):
    text = cost_tables.markdown(results)
    for row in results["targets"]:
        line = next(line for line in text.splitlines() if line.startswith(f"| {row['quantity']} |"))
        assert line.endswith("| met |" if row["value"] <= row["target"] else "| **missed** |")


def test_withheld_targets_give_the_reason():
    assert cost_tables.target_table({"withheld": "EMAUnit: off"}) == ["**Withheld**, because of EMAUnit: off."]


def test_the_same_report_is_written_from_the_raw_numbers(results, tmp_path):
    report.write(results, tmp_path / "first")
    report.main(["--render", str(tmp_path / "first" / "results.json"), "--output", str(tmp_path / "second")])
    for name in ("report.md", "results.json", "costs.png", "growth.png", "grid.md", "grid.png"):
        content = (tmp_path / "first" / name).read_bytes()
        assert content == (tmp_path / "second" / name).read_bytes()
        assert not name.endswith("png") or content.startswith(b"\x89PNG")
    assert len(list((tmp_path / "first").iterdir())) == 6


def test_the_readme_gets_the_cost_table_between_its_markers(results, tmp_path):
    readme = tmp_path / "README.md"
    begin, end = report.README_MARKERS
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    for _ in range(2):  # again changes nothing
        update_readme(readme, report.README_MARKERS, cost_tables.readme_table(results))
        before, table, after = readme.read_text().replace(end, begin).split(begin)
        assert (before, after) == ("before\n", "\nafter\n")
        assert "old" not in table
        assert "`command`" in table
        rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")]
        assert rows[2:] == [name for name in BLOCKS if name in cost_tables.IN_README]


@pytest.mark.parametrize("text", ["{end}\n{begin}\nmine", "{begin}\n{end}\n{begin}", "{begin}"])
def test_a_readme_without_markers_in_order_is_left_alone(text, tmp_path):
    readme = tmp_path / "README.md"
    begin, end = report.README_MARKERS
    readme.write_text(text.format(begin=begin, end=end))
    before = readme.read_text()
    with pytest.raises(ValueError, match=r"README.md must have one line .* and, below it, one line"):
        update_readme(readme, report.README_MARKERS, "new\n")
    assert readme.read_text() == before


def test_the_blocks_that_are_quicker_are_named_with_the_arithmetic_a_second():
    def row(ms, gmac=1):
        return {"macs": gmac * 1e9, "forward": {"median": ms / 1e3}}

    blocks = {"EMAU as published": row(8, 2), "EMAUnit": row(5), "PAM": row(6), "CAM": row(4), 'EMAUnit, "all"': row(4)}
    sentence = "In the forward EMAUnit computes 200 GMAC a second, and the published unit 250."
    assert cost_tables.rates({"blocks": blocks}) == sentence
    assert cost_tables.quicker_blocks({"blocks": blocks}).endswith("take less time for a forward than EMAUnit: CAM.")
    del blocks["CAM"]
    assert cost_tables.quicker_blocks({"blocks": blocks}) == ""


def test_missed_targets_are_named_by_kind_the_farthest_first():
    def row(quantity, value, target, **times):
        return {"quantity": quantity, "value": value, "target": target, **times}

    rows = [
        row("forward", 0.6, 0.5, beside={}),
        row("step", 0.9, 0.5, beside={}),
        row("tokens", 0.4, 0.5, beside={}),
        row("bfloat16: forward", 1.1, 1.0, beside={}),
        row("worst cell", 1.0, 1.0, beside={}),
        row("memory", 1.0, 1.5),
        row("largest error", 2e-5, 1e-5),
    ]
    assert cost_tables.missed_targets(rows) == [
        "The project has set the unit 7 [targets](benchmarks/costs/targets.py). It misses 4. "
        "Each is named with the value that it has, then the one wanted:",
        "",
        "- Large maps and tokens, in float32, 2 of 3: 0.90, not 0.50 (step); 0.60, not 0.50 (forward).",
        "- Half precision, 1 of 1: 1.10, not 1.00 (bfloat16: forward).",
        "- Memory, arithmetic and rounding, 1 of 2: 2.0e-05, not 1.0e-05 (largest error).",
    ]
    assert cost_tables.missed_targets(rows[-3:-1]) == [
        "The unit meets all of its 2 [targets](benchmarks/costs/targets.py)."
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--render", "nowhere.json"], "nowhere.json"),
        (["--render", "broken.json"], "broken.json must hold a benchmark's results, as JSON: Expecting value"),
        (
            ["--render", "others.json"],
            "others.json must hold results with command, environment, costs, growth, targets",
        ),
        (["--render", "good.json", "--readme", "good.json"], "good.json must have one line <!-- cost table: begin -->"),
        (["--threads", "0"], "--threads must be at least 1; got 0"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, message, results, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("")
    (tmp_path / "others.json").write_text('{"environment": {}, "networks": {}}')
    (tmp_path / "good.json").write_text(json.dumps(results))
    with pytest.raises(SystemExit) as exit_:
        report.main([*arguments, "--output", str(tmp_path / "out")])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


README = Path(__file__).parents[2] / "README.md"


def test_the_readmes_cost_table_is_that_of_a_committed_run():
    begin, end = report.README_MARKERS
    table = README.read_text().split(begin)[1].split(end)[0].lstrip("\n")
    runs = [json.loads(path.read_text()) for path in RESULTS.glob("*/results.json")]
    assert table in [cost_tables.readme_table(run) for run in runs]
