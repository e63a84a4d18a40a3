"""The report from end to end, at sizes where it takes seconds."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_blocks, growth, paper, report
from benchmarks.blocks import BLOCKS
from benchmarks.measure import MODES, memory, prepare
from benchmarks.sizes import Sizes

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
)


@pytest.fixture(scope="module")
def results():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BLOCKS, "CAM", BLOCKS["CAM"]._replace(parameters=lambda c: 2))
        patch.setattr(paper, "table", lambda: [])  # has a test of its own
        return json.loads(json.dumps(report.measure(TINY, "cpu", 1e9, "command")))


def test_a_wrong_block_is_withheld_and_the_others_are_reported(results):
    text = report.markdown(results)
    assert "**Withheld: CAM**, because its parameters are 1, its formula's 2." in text
    measured = [name for name in BLOCKS if name != "CAM"]
    assert list(results["costs"][0]["blocks"]) == measured
    assert list(results["growth"]["training step"]) == measured
    assert "| CAM |" not in text
    for name in measured:
        assert f"\n| {name} | {BLOCKS[name].parameters(16):,} | " in text


def test_every_target_is_shown_with_what_it_is(results):
    text = report.markdown(results)
    for row in results["targets"]:
        line = next(line for line in text.splitlines() if line.startswith(f"| {row['quantity']} |"))
        assert line.endswith("| met |" if row["value"] <= row["target"] else "| **missed** |")


def test_targets_are_withheld_when_a_unit_is_wrong():
    assert "withheld" in "".join(report.target_table({"withheld": "EMAUnit: off"})).lower()


def test_the_same_report_is_written_from_the_raw_numbers(results, tmp_path):
    report.write(results, tmp_path / "first")
    report.main(["--render", str(tmp_path / "first" / "results.json"), "--output", str(tmp_path / "second")])
    for name in ("report.md", "results.json", "costs.png", "growth.png"):
        content = (tmp_path / "first" / name).read_bytes()
        assert content == (tmp_path / "second" / name).read_bytes()
        assert not name.endswith("png") or content.startswith(b"\x89PNG")
    assert len(list((tmp_path / "first").iterdir())) == 4


def test_the_readme_gets_the_cost_table_between_its_markers(results, tmp_path):
    readme = tmp_path / "README.md"
    begin, end = report.MARKERS
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    for _ in range(2):  # again changes nothing
        report.update_readme(readme, report.MARKERS, report.readme_table(results))
        before, table, after = readme.read_text().replace(end, begin).split(begin)
        assert (before, after) == ("before\n", "\nafter\n")
        assert "old" not in table
        assert "`command`" in table
        assert "| Hamburger (NMF) | 560 |" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--render", "nowhere.json"], "nowhere.json"),
        (["--render", "broken.json"], "Expecting value"),
        (["--render", "good.json", "--readme", "good.json"], "good.json must have one line <!-- cost table: begin -->"),
        (["--threads", "0"], "--threads must be at least 1; got 0"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, message, results, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("")
    (tmp_path / "good.json").write_text(json.dumps(results))
    with pytest.raises(SystemExit) as exit_:
        report.main([*arguments, "--output", str(tmp_path / "out")])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_growth_stops_before_the_memory_limit_and_says_where():
    block, sides, limit = BLOCKS["Non-local"], (16, 24, 32, 48), 10e6
    grown = growth.grow(block, "forward", 16, sides, bytes_limit=limit, seconds_limit=60)
    assert [point["n"] for point in grown["points"]] == [256, 576, 1024]
    assert all(point["bytes"] < limit for point in grown["points"])
    actual = memory(prepare(block.make(16), (1, 16, 48, 48), "forward")).peak / 1e6
    assert actual > 10
    said = grown["stopped"].removeprefix("out of memory at N = 2,304: ").removesuffix(" GB")
    assert float(said) == pytest.approx(actual / 1e3, abs=0.06)


def test_growth_stops_before_the_time_limit():
    grown = growth.grow(BLOCKS["Non-local"], "forward", 16, (8, 64), bytes_limit=1e9, seconds_limit=1e-4)
    assert [point["n"] for point in grown["points"]] == [64]
    assert grown["stopped"].startswith("out of time at N = 4,096")


def test_growth_has_the_exponent_of_its_points():
    points = [{"n": n, "seconds": {"median": 1e-9 * n**2}, "bytes": 8 * n} for n in (10, 100, 1000, 10_000)]
    assert growth.exponents({"points": points}) == pytest.approx({"seconds": 2, "bytes": 1})
    assert growth.exponents({"points": points[:2]}) == {"seconds": None, "bytes": None}


def test_the_papers_table_is_the_papers_to_its_digits():
    rows = {row["name"]: (round(row["macs"] / 1e9, 2), round(row["parameters"] / 1e6, 3)) for row in paper.table()}
    assert rows["ResNet-101"] == (182.75, 42.5)
    assert rows["ResNet-101, published stem"][1] == pytest.approx(42.6, abs=0.05)
    assert rows["EMANet (512)"] == (43.06, 9.964)
    assert rows["EMANet (256)"] == (20.97, 4.851)
    assert rows["DeepLabV3, ASPP alone"] == (63.41, 15.535)  # published: 63.4 and 15.5


def test_bench_covers_every_block_and_size():
    cases = bench_blocks.cases(quick=False)
    on_cpu = {(c.name, c.mode, c.channels, c.side, c.batch) for c in cases if c.device == "cpu"}
    names = set(itertools.product(BLOCKS, MODES)) - {('EMAUnit, gradient="all"', "forward")}
    sizes = set(itertools.product((256, 512), (33, 65, 97, 129), (1, 4)))
    assert on_cpu == {(*name, *size) for name in names for size in sizes}


def test_bench_foretells_time_from_the_size_before():
    small, large = (bench_blocks.Case("CAM", 16, side, 1, "forward", torch.float32, "cpu") for side in (8, 16))
    budget = bench_blocks.Budget(100)
    budget.measured(small, 0.5)
    assert budget.foretold(large) == pytest.approx(2.0)
    assert 99 < budget.left() <= 100


README = Path(__file__).parent.parent / "README.md"


@pytest.mark.skipif(report.MARKERS[0] not in README.read_text(), reason="the README has no cost table")
def test_the_readmes_cost_table_is_that_of_a_committed_run():
    begin, end = report.MARKERS
    table = README.read_text().split(begin)[1].split(end)[0].lstrip("\n")
    runs = [json.loads(path.read_text()) for path in report.RESULTS.glob("*/results.json")]
    assert table in [report.readme_table(run) for run in runs]
