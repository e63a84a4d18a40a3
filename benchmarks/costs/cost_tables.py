"""The cost report in Markdown, from the results of ``measure_costs``."""

from __future__ import annotations

import math

import torch

from benchmarks.costs import grid
from benchmarks.costs.growth import exponents
from benchmarks.costs.targets import grid_targets
from benchmarks.measure import MODES
from benchmarks.reporting import SHORT, markdown_table, milliseconds

PAIR_HEADING = "EMAUnit compared with the published unit"
PUBLISHED = "EMAU as published"
IN_README = (PUBLISHED, "EMAUnit", 'EMAUnit, gradient="all"', "Non-local, fused attention")
"""The blocks of the README's table."""


def markdown(results: dict) -> str:
    """All of ``report.md``."""
    lines = [
        f"# Benchmarks: {results['environment']['machine']}",
        "",
        *measured_by(results),
        "",
        "How each number is taken: [benchmarks/README.md](../../README.md). Raw numbers: [results.json](results.json).",
        "",
    ]
    lines += [f"**Withheld: {name}**, because {reason}." for name, reason in results["withheld"].items()]
    lines += [f"## {PAIR_HEADING}", "", *target_table(_targets(results)), ""]
    if "grid" in results:
        lines += [f"## {PAIR_HEADING}, cell by cell", "", *grid_section(results), ""]
    for table in results["costs"]:
        lines += [f"## What each block costs, {tuple(table['shape'])}, {table['dtype']}", "", *cost_table(table), ""]
        lines += [sentence, ""] if (sentence := headline(table)) else []
    lines += ["![costs](costs.png)", "", "## The paper's table", "", *paper_table(results["paper"]), ""]
    lines += ["## Growth with the number of positions", "", "![growth](growth.png)", ""]
    for mode, grown in results["growth"].items():
        lines += [f"### {mode.capitalize()}, C = {results['sizes']['growth_channels']}", "", *growth_table(grown), ""]
    return "\n".join(lines)


def measured_by(results: dict) -> list[str]:
    """The command, and where and when it ran."""
    env = results["environment"]
    facts = [
        f"device {env['device']}",
        f"threads {env['threads']}",
        f"PyTorch {env['torch']}",
        f"Python {env['python']}",
        env["system"],
        f"ema-attention {env['ema_attention']}",
        f"commit {env['commit']}",
        env["date"],
    ]
    return [f"`{results['command']}`", "", " · ".join(facts)]


def _targets(results: dict) -> list[dict] | dict:
    """The rows of the targets, those of the grid among them."""
    rows = results["targets"]
    return rows if isinstance(rows, dict) else rows + grid_targets(results.get("grid", {}).get("cells", []))


def _value_and_target(row: dict) -> tuple[str, str]:
    number = ".2f" if row["target"] >= 1e-3 else ".1e"
    return f"{row['value']:{number}}", f"{row['target']:{number}}"


def target_table(rows: list[dict] | dict) -> list[str]:
    if isinstance(rows, dict):
        return [f"**Withheld**, because of {rows['withheld']}."]
    cells = []
    for row in rows:
        if "beside" in row:
            parts = [milliseconds(row["unit"], SHORT), milliseconds(row["beside"], SHORT)]
        else:
            parts = ["", f"{row['published']:.2f}" if "published" in row else ""]
        verdict = "met" if row["value"] <= row["target"] else "**missed**"
        value, target = _value_and_target(row)
        cells.append([row["quantity"], *parts, value, f"≤ {target}", verdict])
    met = sum(row["value"] <= row["target"] for row in rows)
    text = (
        "A / B is the ratio of the medians of calls measured in turns; the columns before it are A and B in ms, median "
        "[quartiles]. Where B is the published unit's memory or GMAC, it stands there for comparison. "
        f"{met} of {len(rows)} targets are met."
    )
    return [text, "", *markdown_table(["quantity, EMAUnit (A) / other (B)", "A", "B", "EMAUnit", "target", ""], cells)]


def cost_table(table: dict) -> list[str]:
    """One row a block: parameters, GMAC, times and memory."""
    output = math.prod(table["shape"]) * getattr(torch, table["dtype"]).itemsize
    rows = []
    for name, row in table["blocks"].items():
        forward, step = (row[mode] for mode in MODES)
        rows.append(
            [
                name,
                f"{row['parameters']:,}",
                f"{row['macs'] / 1e9:.2f}",
                milliseconds(forward),
                milliseconds(step),
                f"{forward['peak'] / 2**20:.1f}",
                f"{step['peak'] / 2**20:.1f}",
                f"{row['held'] / 2**20:.1f}",
            ]
        )
    head = [
        "block",
        "parameters",
        "GMAC",
        "forward, ms",
        "training step, ms",
        "peak forward, MiB",
        "peak step, MiB",
        "held, MiB",
    ]
    text = (
        f"One output is {output / 2**20:.1f} MiB. GMAC: 10⁹ multiply-accumulates of a forward of one sample (a MAC is "
        "two FLOPs). Times: median [quartiles]. Peak: beyond the input. Held: from a forward to its backward, "
        "beyond input and output."
    )
    return [text, "", *markdown_table(head, rows)]


def paper_table(rows: list[dict]) -> list[str]:
    cells = []
    for row in rows:
        published = row["published"]
        sign = "" if row["name"].startswith("ResNet") else "+"
        cells.append(
            [
                row["name"],
                f"{sign}{row['macs'] / 1e9:.2f}",
                f"{sign}{published[0] / 1e9:.1f}" if published else "",
                f"{sign}{row['parameters'] / 1e6:.3f}",
                f"{sign}{published[1] / 1e6:.2f}" if published else "",
                row["note"],
            ]
        )
    head = ["513×513, output stride 8", "GMAC", "published", "M parameters", "published", "why they differ"]
    text = "Heads are what they add to the backbone, torchvision's without its classifier. Counted, nothing is run."
    return [text, "", *markdown_table(head, cells)]


def growth_table(grown: dict) -> list[str]:
    sizes = sorted({point["n"] for block in grown.values() for point in block["points"]})
    rows = []
    for name, block in grown.items():
        points = {point["n"]: point for point in block["points"]}
        fitted = exponents(block)
        rows.append(
            [
                name,
                *(
                    f"{_seconds(points[n]['seconds']['median'])}, {points[n]['bytes'] / 2**20:,.0f} MiB"
                    if n in points
                    else ""
                    for n in sizes
                ),
                *(f"{p:.2f}" if (p := fitted[key]) is not None else "" for key in ("seconds", "bytes")),
                block["stopped"] or "",
            ]
        )
    head = ["block", *(f"N = {n:,}" for n in sizes), "time ∝ Nᵖ", "memory ∝ Nᵖ", "where it stops"]
    text = "Median time and peak memory beyond the input; exponents are fitted to the last three sizes."
    return [text, "", *markdown_table(head, rows)]


def headline(table: dict) -> str | None:
    """EMAUnit's time in a cost table, as a ratio of the published unit's."""
    rows = table["blocks"]
    if not {"EMAUnit", PUBLISHED} <= rows.keys():
        return None
    ratios = [rows["EMAUnit"][mode]["median"] / rows[PUBLISHED][mode]["median"] for mode in MODES]
    return (
        f"In this table a forward of EMAUnit takes {ratios[0]:.2f} of the published unit's time. "
        f"A training step takes {ratios[1]:.2f}."
    )


def grid_section(results: dict) -> list[str]:
    """The grid in words: its worst cell, its means, every cell above 1.00, and the picture."""
    measured = results["grid"]
    if "withheld" in measured:
        return [f"**Withheld**, because of {measured['withheld']}."]
    cells, lines = measured["cells"], [grid_rule(measured), ""]
    if _was_alone(results):
        lines += ["These cells were measured by a command of their own:", "", *measured_by(measured), ""]
    for variant, rows in grid.variants(cells).items():
        worst, above, small = grid.worst(rows), grid.above_one(rows), grid.small_float32(rows)
        small_mean = (
            f" Of the {len(small)} in float32 up to 32×32: **{grid.geometric_mean(small):.2f}**." if small else ""
        )
        lines += [
            f"**{len(rows)} cells, {variant}.**",
            "",
            f"- Worst cell: **{grid.ratio(worst):.2f}** ({grid.name(worst)}).",
            f"- Geometric mean: **{grid.geometric_mean(rows):.2f}**.{small_mean}",
            f"- Above 1.00: **{len(above)}** of {len(rows)} cells.",
            "",
        ]
        if above:
            lines += ["These are all cells above 1.00:", "", *grid_table(above), ""]
    lines += ["![EMAUnit's time / the published unit's, for every cell](grid.png)", ""]
    return [*lines, "The complete table: [grid.md](grid.md)."]


def grid_rule(measured: dict) -> str:
    """What the ratios are, and which cells are left out."""
    rule = (
        "Each ratio is EMAUnit's median time / the published unit's. Below 1.00 EMAUnit is faster. Both have the same "
        "weights. Their calls are measured in turns in one process. "
        f"A cell is left out if its input, in float32, is larger than {measured['largest_input'] / 2**20:.0f} MiB. "
        "Tokens are (B, N, C), with as many positions as the image has. EMAUnit gets `channel_dim=-1`. The published "
        "unit gets the same tokens as (B, C, 1, N), and its output is turned back. "
        'With `gradient="all"` the published unit is differentiated in all its stages, too. '
        "Autocast: weights and input in float32, the forward under `torch.autocast`, the backward outside it."
    )
    if measured["convolutions_in_tf32"]:
        rule += (
            " On this GPU, float32 convolutions use TF32 and float32 products do not: PyTorch's defaults. "
            "In the other tables convolutions do not use TF32."
        )
    return rule


def _was_alone(results: dict) -> bool:
    return results["grid"]["command"] != results["command"]


def grid_table(rows: list[dict]) -> list[str]:
    head = ["mode", "precision", "input", "H = W", "batch", "compiled", "EMAUnit, ms", "published, ms", "ratio"]
    is_compiled = any(row["compiled"] for row in rows)
    cells = []
    for row in rows:
        times = [milliseconds(row["unit"], SHORT), milliseconds(row["published"], SHORT), f"{grid.ratio(row):.2f}"]
        compiled = ["yes" if row["compiled"] else ""] if is_compiled else []
        words = [row["mode"], row["precision"], grid.input_name(row), str(row["side"]), str(row["batch"])]
        cells.append([*words, *compiled, *times])
    return markdown_table(head if is_compiled else [word for word in head if word != "compiled"], cells)


def grid_markdown(results: dict) -> str:
    """All of ``grid.md``."""
    measured = results["grid"]
    lines = [
        f"# {PAIR_HEADING}, every cell: {measured['environment']['machine']}",
        "",
        *measured_by(measured),
        "",
        grid_rule(measured),
        "",
        "Times: median [quartiles]. The summary: [report.md](report.md). Raw numbers: [results.json](results.json).",
        "",
        *grid_table(measured["cells"]),
    ]
    return "\n".join(lines)


def readme_table(results: dict) -> str:
    """A few rows and columns of the first cost table, and below it what the grid and the targets show."""
    env, table = results["environment"], results["costs"][0]
    caption = (
        f"{env['machine']}, threads {env['threads']}, {table['dtype']}, input {tuple(table['shape'])}, "
        f"PyTorch {env['torch']}; `{results['command']}`."
    )
    text = (
        "Times: median [quartiles]. Peak: of a forward, beyond the input. GMAC: 10⁹ multiply-accumulates of a forward."
    )
    cells = []
    for name in IN_README:
        if row := table["blocks"].get(name):
            forward, step = (row[mode] for mode in MODES)
            peak = f"{forward['peak'] / 2**20:.1f}"
            cells.append([name, milliseconds(forward), milliseconds(step), peak, f"{row['macs'] / 1e9:.2f}"])
    head = ["block", "forward, ms", "training step, ms", "peak forward, MiB", "GMAC"]
    lines = [caption, text, "", *markdown_table(head, cells), ""]
    if sentence := headline(table):
        lines += [f"{sentence} {rates(table)}{quicker_blocks(table)}", ""]
    if rows := grid.variants(results.get("grid", {}).get("cells", [])).get("eager"):
        best, worst = grid.best(rows), grid.worst(rows)
        lines += [
            f"Over {len(rows)} cells of size, batch, precision and mode, the geometric mean of this ratio is "
            f"{grid.geometric_mean(rows):.2f}. EMAUnit is slower in {len(grid.above_one(rows))} of them. "
            f"The best cell is {grid.ratio(best):.2f} ({grid.name(best)}). "
            f"The worst cell is {grid.ratio(worst):.2f} ({grid.name(worst)}).",
            "",
        ]
    targets = _targets(results)
    return "\n".join([*lines, *missed_targets(targets), ""] if isinstance(targets, list) else lines)


def rates(table: dict) -> str:
    """How much arithmetic a second both units do in a forward."""
    unit, published = (table["blocks"][name] for name in ("EMAUnit", PUBLISHED))
    unit, published = (row["macs"] / row["forward"]["median"] / 1e9 for row in (unit, published))
    return f"In the forward EMAUnit computes {unit:.0f} GMAC a second, and the published unit {published:.0f}."


def quicker_blocks(table: dict) -> str:
    """A sentence that names the other blocks whose forward takes less time than EMAUnit's, if there are any."""
    rows = table["blocks"]
    limit = rows["EMAUnit"]["forward"]["median"]
    others = [name for name in rows if not name.startswith("EMA") and rows[name]["forward"]["median"] < limit]
    if not others:
        return ""
    return f" Of the report's other blocks, these take less time for a forward than EMAUnit: {', '.join(others)}."


def missed_targets(rows: list[dict]) -> list[str]:
    """Every target that is missed, by kind, the one that is missed most first."""
    missed = [row for row in rows if row["value"] > row["target"]]
    count = f"The project has set the unit {len(rows)} [targets](benchmarks/costs/targets.py). It misses {len(missed)}."
    lines = [f"{count} Each is named with the value that it has, then the one wanted:", ""]
    for kind in dict.fromkeys(map(_kind, missed)):
        some = [row for row in missed if _kind(row) == kind]
        some.sort(key=lambda row: row["value"] / row["target"], reverse=True)
        each = "; ".join(f"{', not '.join(_value_and_target(row))} ({row['quantity']})" for row in some)
        lines.append(f"- {kind}, {len(some)} of {sum(_kind(row) == kind for row in rows)}: {each}.")
    return lines if missed else [f"The unit meets all of its {len(rows)} [targets](benchmarks/costs/targets.py)."]


def _kind(row: dict) -> str:
    """What a target is about."""
    if row["quantity"].startswith(("worst", "geometric mean")):
        return "Every size, in float32"
    if "bfloat16" in row["quantity"]:
        return "Half precision"
    return "Large maps and tokens, in float32" if "beside" in row else "Memory, arithmetic and rounding"


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{1e3 * seconds:.0f} ms" if seconds >= 0.01 else f"{1e3 * seconds:.1f} ms"
