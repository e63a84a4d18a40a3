"""The grid of both units: its maths, its pages and picture from made-up cells, and a real measurement of seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import benchmarks
from benchmarks.blocks import UNIT_SIZES
from benchmarks.costs import __main__ as report
from benchmarks.costs import cost_tables, grid, unit_pairs
from benchmarks.costs.cost_plots import plot_grid
from benchmarks.costs.grid import Cell
from benchmarks.costs.measure_costs import measure_grid_alone
from benchmarks.costs.sizes import FULL, QUICK, Grid
from benchmarks.costs.targets import grid_targets
from benchmarks.environment import machine
from benchmarks.reporting import RESULTS

TINY = Grid(
    sides=(4, 23),
    batches=(1, 2),
    channels=(16,),
    token_channels=(24,),
    precisions=FULL.grid.precisions,
    seconds=0,
    least=2,
    largest_input=4 * 16 * 23**2 * 2,
)


def made_up(
    ratio: float, side: int = 32, precision: str = "float32", mode: str = "eval forward", **fields: Any
) -> dict:
    cell = Cell(side, fields.pop("batch", 1), 512, fields.pop("tokens", False), precision, mode, **fields)
    times = {"unit": ratio * 0.002, "published": 0.002}
    return {**cell._asdict(), **{k: {"median": v, "quartiles": [v, v], "samples": 5} for k, v in times.items()}}


CELLS = [
    made_up(0.5),
    made_up(2.0, side=65),
    made_up(1.5, precision="bfloat16 model"),
    made_up(1.0, side=7, mode='training step, gradient="all"'),
    made_up(1.05, side=7, batch=8),
]


def test_worst_mean_and_the_cells_above_one() -> None:
    assert grid.worst(CELLS) is CELLS[1]
    assert grid.geometric_mean([made_up(0.25), made_up(1.0)]) == pytest.approx(0.5)
    assert grid.above_one(CELLS) == [CELLS[1], CELLS[2], CELLS[4]]
    assert grid.small_float32(CELLS) == [CELLS[0], CELLS[3], CELLS[4]]


def test_targets_of_the_grid_are_those_of_its_worst_cells() -> None:
    rows = grid_targets([*CELLS, made_up(0.3, compiled=True)])
    assert [(row["value"], row["target"]) for row in rows] == [
        (pytest.approx(2.0), 1.0),
        (pytest.approx(1.05), 1.1),
        (pytest.approx((0.5 * 1.05) ** (1 / 3)), 0.9),
        (pytest.approx(0.3), 1.0),
        (pytest.approx(0.3), 0.9),
    ]
    assert rows[0]["quantity"] == ("worst float32 cell from 14×14 of 2: eval forward, float32, C = 512, 65×65, batch 1")
    assert rows[3]["quantity"].startswith("worst compiled float32 cell")
    assert grid_targets([]) == []


def test_cells_are_every_combination_below_the_limit() -> None:
    full = grid.cells(FULL.grid, "cpu")
    assert len(full) == len(set(full)) == 378
    assert max(cell.input_bytes for cell in full) == FULL.grid.largest_input == 4 * 32 * 512 * 32**2
    assert {cell.side for cell in full if cell.batch == 32} == {7, 14, 16, 32}
    assert not any(cell.compiled for cell in full)
    on_gpu = grid.cells(FULL.grid, "cuda")
    assert {cell.side for cell in on_gpu if cell.batch == 32} == {7, 14, 16, 32, 65}
    assert sum(cell.compiled for cell in on_gpu) == 2 * 3 * 9
    assert len(grid.cells(QUICK.grid, "cpu")) == 3 * 2 * 2 * 2 * 3


@pytest.fixture(scope="module")
def measured() -> dict:
    sizes = QUICK._replace(grid=TINY)
    return json.loads(json.dumps(measure_grid_alone(sizes, "cpu", "python -m benchmarks.costs --only grid")))


def test_every_cell_is_measured(measured: dict) -> None:
    cells = [Cell(**{k: v for k, v in row.items() if k not in ("unit", "published")}) for row in measured["cells"]]
    assert cells == grid.cells(TINY, "cpu")
    assert {cell.shape for cell in cells} == {
        *((1, 16, 4, 4), (2, 16, 4, 4), (1, 16, 23, 23), (2, 16, 23, 23)),
        *((1, 16, 24), (2, 16, 24), (1, 529, 24)),
    }
    for row in measured["cells"]:
        assert row["unit"]["samples"] == row["published"]["samples"] == 2
        assert 0 < row["unit"]["median"] < 1


def test_a_wrong_unit_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = unit_pairs.OnTokens.forward
    monkeypatch.setattr(unit_pairs.OnTokens, "forward", lambda self, x: 1.001 * forward(self, x))
    withheld = measure_grid_alone(QUICK._replace(grid=TINY), "cpu", "command")
    assert withheld["withheld"].startswith("published on tokens: its output is off the published unit's by")
    section = cost_tables.grid_section({"grid": withheld})
    assert section == [f"**Withheld**, because of {withheld['withheld']}."]


@pytest.mark.parametrize("gradient", ["none", "all"])
@pytest.mark.parametrize("tokens", [False, True])
def test_both_of_a_pair_compute_and_differentiate_the_same(gradient: Any, tokens: bool) -> None:
    pair = unit_pairs.units(16, gradient, tokens)
    height, width = UNIT_SIZES[1]
    shape = (2, height * width, 16) if tokens else (2, 16, height, width)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)  # in float32 a value near 0 may be either's
    outs = [module.double().train()(x) for module in pair]
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)  # the published unit adds 1e-6 to its norms
    probe = torch.randn_like(x)
    grads = [torch.autograd.grad(out, x, probe)[0] for out in outs]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_precisions_are_what_they_say() -> None:
    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.conv(x)
            seen.append((x.dtype, self.conv.weight.dtype, out.dtype))
            return out

    seen: list[tuple[torch.dtype, ...]] = []
    for precision in FULL.grid.precisions:
        pair = unit_pairs.Pair(Seen(), Seen())
        unit_pairs.prepare_pair(pair, (1, 4, 3, 3), "training step", precision)["unit"]()
    single, half = torch.float32, torch.bfloat16
    assert seen == [(single,) * 3, (half,) * 3, (single, single, half)]


def test_tf32_is_as_pytorch_sets_it_inside_and_off_outside() -> None:
    assert benchmarks.TF32_OF_PYTORCH
    assert not torch.backends.cudnn.allow_tf32
    with grid.tf32_as_pytorch_sets_it():
        assert torch.backends.cudnn.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


def as_grid(cells: list[dict], measured: dict) -> dict:
    return {**measured, "cells": cells}


def test_the_section_names_the_worst_cell_the_means_and_all_cells_above_one(measured: dict) -> None:
    results = {"grid": as_grid(CELLS, measured), "command": measured["command"]}
    text = "\n".join(cost_tables.grid_section(results))
    assert "Worst cell: **2.00** (eval forward, float32, C = 512, 65×65, batch 1)." in text
    assert "Geometric mean: **1.10**. Of the 3 in float32 up to 32×32: **0.81**." in text
    assert "Above 1.00: **3** of 5 cells." in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "C = 512" in line]
    assert rows == [
        "| eval forward | float32 | C = 512 | 65 | 1 | 4.00 [4.00–4.00] | 2.00 [2.00–2.00] | 2.00 |",
        "| eval forward | bfloat16 model | C = 512 | 32 | 1 | 3.00 [3.00–3.00] | 2.00 [2.00–2.00] | 1.50 |",
        "| eval forward | float32 | C = 512 | 7 | 8 | 2.10 [2.10–2.10] | 2.00 [2.00–2.00] | 1.05 |",
    ]
    assert "is larger than 0 MiB" in text
    assert "TF32" not in text
    on_gpu = {**results, "grid": {**results["grid"], "convolutions_in_tf32": True}}
    assert "float32 convolutions use TF32" in "\n".join(cost_tables.grid_section(on_gpu))


def test_the_picture_has_a_panel_a_mode_and_every_ratio_in_its_place(measured: dict) -> None:
    figure = plot_grid([*CELLS, made_up(0.7, compiled=True)])
    assert [axis.get_title("left") for axis in figure.axes[:-1]] == [
        *grid.CELL_MODES,
        *(f"{mode}, compiled" for mode in grid.CELL_MODES),
    ]
    axis = figure.axes[0]
    rows = [label.get_text() for label in axis.get_yticklabels()]
    columns = [label.get_text() for label in axis.get_xticklabels()]
    assert rows == ["float32, C = 512", "bfloat16 model, C = 512"]
    assert columns == ["7×7\n1", "7×7\n8", "32×32\n1", "65×65\n1"]
    texts = {text.get_position(): text.get_text() for text in axis.texts}
    assert [[texts[j, i] for j in range(4)] for i in range(2)] == [
        ["–", "1.05", "0.50", "2.00"],
        ["–", "–", "1.50", "–"],
    ]
    image = axis.images[0]
    red, green, blue, _ = image.cmap(image.norm(0.0))  # of the logarithm of 1.00
    assert min(red, green, blue) > 0.95
    assert plot_grid(measured["cells"]).axes


@pytest.fixture(scope="module")
def old() -> dict:
    """The results of a committed run, without its grid."""
    results = json.loads((RESULTS / "intel-xeon-2-cores" / "results.json").read_text())
    return {key: value for key, value in results.items() if key != "grid"}


def test_results_without_a_grid_are_still_written(old: dict, tmp_path: Path) -> None:
    report.write(old, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.md", "costs.png", "growth.png"}
    text = (tmp_path / "report.md").read_text()
    assert "cell by cell" not in text
    assert cost_tables.headline(old["costs"][0]) in text
    assert "worst cell" not in cost_tables.readme_table({**old, "targets": []})


def test_the_readmes_lines_have_the_ratios_of_its_table_and_of_the_grid(old: dict, measured: dict) -> None:
    lines = cost_tables.readme_table({**old, "grid": as_grid(CELLS, measured)}).splitlines()
    forward, step = (
        old["costs"][0]["blocks"]["EMAUnit"][mode]["median"]
        / old["costs"][0]["blocks"]["EMAU as published"][mode]["median"]
        for mode in ("forward", "training step")
    )
    sentence = (
        f"In this table a forward of EMAUnit takes {forward:.2f} of the published unit's time. "
        f"A training step takes {step:.2f}. In the forward EMAUnit computes "
    )
    assert any(line.startswith(sentence) for line in lines)
    assert (
        "Over 5 cells of size, batch, precision and mode, the geometric mean of this ratio is 1.10. EMAUnit is slower "
        "in 3 of them. The best cell is 0.50 (eval forward, float32, C = 512, 32×32, batch 1). "
        "The worst cell is 2.00 (eval forward, float32, C = 512, 65×65, batch 1)."
    ) in lines


def test_the_report_says_which_commit_the_cells_are_of_if_they_were_measured_alone(old: dict, measured: dict) -> None:
    lines = cost_tables.grid_section({**old, "grid": as_grid(CELLS, measured)})
    assert "These cells were measured by a command of their own:" in lines
    assert any(f"commit {measured['environment']['commit']}" in line for line in lines)


def test_only_grid_is_put_into_the_results_and_nothing_is_lost(
    old: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "QUICK", QUICK._replace(grid=TINY))
    old = {**old, "environment": {**old["environment"], "machine": machine("cpu")}}
    report.write(old, tmp_path)
    report.main(["--only", "grid", "--quick", "--device", "cpu", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.pop("sizes") == {**old["sizes"], "grid": json.loads(json.dumps(TINY._asdict()))}
    assert {key: results[key] for key in old if key != "sizes"} == {key: old[key] for key in old if key != "sizes"}
    assert len(results["grid"]["cells"]) == len(grid.cells(TINY, "cpu"))
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "grid.md").read_text()
    assert table.count("\n| eval forward |") + table.count("\n| training step") == len(results["grid"]["cells"])
    text = (tmp_path / "report.md").read_text()
    assert "## EMAUnit compared with the published unit, cell by cell\n" in text
    assert "[grid.md](grid.md)" in text
    assert "`python -m benchmarks.costs --only grid --quick" in text  # a command of its own
    assert "| geometric mean of the 21 float32 cells up to 32×32 |" in text


def test_only_grid_needs_results_of_this_machine(
    old: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "FULL", FULL._replace(grid=TINY))  # if it measured, it would not be for minutes
    other = {**old, "environment": {**old["environment"], "machine": "another"}}
    report.write(other, tmp_path)
    for arguments, message in (
        (["--only", "grid", "--output", str(tmp_path / "nowhere")], "results.json"),
        (["--only", "grid", "--output", str(tmp_path)], f"must have results of {machine('cpu')}; got another"),
        (["--only", "grid", "--quick"], "--only with --quick needs --output"),
        (["--only", "grid", "--render", "results.json"], "--only measures and --render does not"),
    ):
        with pytest.raises(SystemExit) as error:
            report.main([*arguments, "--device", "cpu"])
        assert error.value.code == 2
        assert message in capsys.readouterr().err
