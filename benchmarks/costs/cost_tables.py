"""The cost report in Markdown, from the results of ``measure_costs``."""

from __future__ import annotations

import torch

from benchmarks.costs.growth import exponents
from benchmarks.measure import MODES
from benchmarks.reporting import markdown_table, milliseconds


def markdown(results: dict) -> str:
    """All of ``report.md``."""
    env = results["environment"]
    lines = [
        f"# Benchmarks: {env['machine']}",
        "",
        f"`{results['command']}`",
        "",
        " · ".join(
            [
                f"device {env['device']}",
                f"threads {env['threads']}",
                f"PyTorch {env['torch']}",
                f"Python {env['python']}",
                env["system"],
                f"ema-attention {env['ema_attention']}",
                f"commit {env['commit']}",
                env["date"],
            ]
        ),
        "",
        "How each number is taken: [benchmarks/README.md](../../README.md). Raw numbers: [results.json](results.json).",
        "",
    ]
    lines += [f"**Withheld: {name}**, because {reason}." for name, reason in results["withheld"].items()]
    lines += ["## EMAUnit beside the published unit", "", *target_table(results["targets"]), ""]
    for table in results["costs"]:
        lines += [f"## What each block costs, {table['shape']}, {table['dtype']}", "", *cost_table(table), ""]
    lines += ["![costs](costs.png)", "", "## The paper's table", "", *paper_table(results["paper"]), ""]
    lines += ["## Growth with the number of positions", "", "![growth](growth.png)", ""]
    for mode, grown in results["growth"].items():
        lines += [f"### {mode.capitalize()}, C = {results['sizes']['growth_channels']}", "", *growth_table(grown), ""]
    return "\n".join(lines)


def target_table(rows: list[dict] | dict) -> list[str]:
    if isinstance(rows, dict):
        return [f"**Withheld**, because of {rows['withheld']}."]
    cells = []
    for row in rows:
        if "beside" in row:
            parts = [milliseconds(row["unit"]), milliseconds(row["beside"])]
        else:
            parts = ["", f"{row['published']:.2f}" if "published" in row else ""]
        verdict = "met" if row["value"] <= row["target"] else "**missed**"
        number = ".2f" if row["target"] >= 1e-3 else ".1e"
        cells.append([row["quantity"], *parts, f"{row['value']:{number}}", f"≤ {row['target']:.3g}", verdict])
    met = sum(row["value"] <= row["target"] for row in rows)
    text = (
        "A / B is the ratio of the medians of calls measured in turns; the columns before it are A and B in ms, median "
        "[quartiles]. Where B is the published unit's memory or GMAC, it stands there for comparison. "
        f"{met} of {len(rows)} targets are met."
    )
    return [text, "", *markdown_table(["quantity, EMAUnit (A) / other (B)", "A", "B", "EMAUnit", "target", ""], cells)]


def cost_table(table: dict) -> list[str]:
    """One row a block: parameters, GMAC, times and memory."""
    output = 1
    for size in table["shape"]:
        output *= size
    output *= getattr(torch, table["dtype"]).itemsize
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


def readme_table(results: dict) -> str:
    """The first cost table, and where it was measured."""
    env, table = results["environment"], results["costs"][0]
    caption = (
        f"{env['machine']}, threads {env['threads']}, {table['dtype']}, input {tuple(table['shape'])}, "
        f"PyTorch {env['torch']}; `{results['command']}`."
    )
    return "\n".join([caption, *cost_table(table), ""])


def _seconds(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds >= 1
        else f"{1e3 * seconds:.0f} ms"
        if seconds >= 0.01
        else f"{1e3 * seconds:.1f} ms"
    )
