"""`make report`: measures everything, and writes Markdown, plots and the raw numbers, a folder for each machine.

::

    python -m benchmarks.report                          # measure, write benchmarks/results/<machine>/
    python -m benchmarks.report --render results.json    # write the same from numbers measured before
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import growth, paper, pictures, targets
from benchmarks.blocks import BLOCKS
from benchmarks.measure import (
    MODES,
    environment,
    failure,
    held_for_backward,
    interleaved,
    memory,
    parameters,
    prepare,
    summary,
)
from benchmarks.sizes import FULL, QUICK, Sizes

RESULTS = Path(__file__).parent / "results"
MARKERS = ("<!-- cost table: begin -->", "<!-- cost table: end -->")


def measure(sizes: Sizes, device: str, bytes_limit: float, command: str) -> dict:
    """Everything the report says, as JSON holds it."""
    withheld = {name: reason for name, block in BLOCKS.items() if (reason := failure(block, device))}
    dtypes = [torch.float32, torch.bfloat16] if torch.device(device).type == "cuda" else [torch.float32]
    blocks = [name for name in BLOCKS if name not in withheld]
    grown = {mode: [n for n in blocks if not (mode == "forward" and BLOCKS[n].forward_of)] for mode in MODES}
    steps = 2 + len(dtypes) * len(MODES) + sum(map(len, grown.values()))
    with tqdm(total=steps, bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} {elapsed} {postfix}") as progress:

        def say(what: str) -> None:
            progress.set_postfix_str(what)

        results: dict = {
            "environment": environment(device),
            "command": command,
            "memory_limit": bytes_limit,
            "sizes": sizes._asdict(),
            "withheld": withheld,
        }
        wrong = targets.wrong_units(device)
        results["targets"] = {"withheld": wrong} if wrong else targets.measure_targets(sizes, device, say)
        progress.update()
        results["costs"] = []
        for dtype in dtypes:
            results["costs"].append(costs(blocks, sizes, dtype, device, progress))
        say("the paper's table")
        results["paper"] = paper.table()
        progress.update()
        results["growth"] = {mode: {} for mode in MODES}
        for mode, names in grown.items():
            for name in names:
                progress.set_description_str(f"{mode}, {name}")
                results["growth"][mode][name] = growth.grow(
                    BLOCKS[name],
                    mode,
                    sizes.growth_channels,
                    sizes.growth,
                    bytes_limit=bytes_limit,
                    seconds_limit=sizes.slowest,
                    seconds=sizes.growth_seconds,
                    device=device,
                    progress=progress,
                )
                progress.update()
    return results


def costs(blocks: list[str], sizes: Sizes, dtype: torch.dtype, device: str, progress: tqdm) -> dict:
    """What each of ``blocks`` costs at the one size of the table, timed in turns."""
    _, channels, height, width = sizes.table
    modules = {name: BLOCKS[name].make(channels) for name in blocks}
    rows: dict[str, dict] = {
        name: {"parameters": parameters(module), "macs": BLOCKS[name].macs(channels, height, width)}
        for name, module in modules.items()
    }
    for mode in MODES:
        progress.set_description_str(f"cost table, {mode}, {dtype}")
        calls = {name: prepare(module, sizes.table, mode, dtype, device) for name, module in modules.items()}
        samples = interleaved(calls, seconds=2 * sizes.seconds, device=device)
        for name, call in calls.items():
            rows[name][mode] = {**summary(samples[name]), "peak": memory(call, device).peak}
        progress.update()
    for name, module in modules.items():
        rows[name]["held"] = held_for_backward(module, sizes.table, dtype, device)
    return {"dtype": str(dtype).removeprefix("torch."), "shape": sizes.table, "blocks": rows}


def markdown(results: dict) -> str:
    """The report."""
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


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    align = ["---"] + ["---:"] * (len(head) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (head, align, *rows)]


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
        fitted = growth.exponents(block)
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


def milliseconds(times: dict) -> str:
    """Median [quartiles] of a :func:`summary`."""
    low, high = times["quartiles"]
    digits = 1 if times["median"] < 0.1 else 0
    return f"{1e3 * times['median']:,.{digits}f} [{1e3 * low:,.{digits}f}–{1e3 * high:,.{digits}f}]"


def _seconds(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds >= 1
        else f"{1e3 * seconds:.0f} ms"
        if seconds >= 0.01
        else f"{1e3 * seconds:.1f} ms"
    )


def write(results: dict, folder: Path) -> None:
    """The report's files into ``folder``, each one atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "results.json": (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode(),
        "report.md": (markdown(results) + "\n").encode(),
        "costs.png": pictures.costs(results["costs"]),
        "growth.png": pictures.growth(results["growth"], results["sizes"]["growth_channels"]),
    }
    for name, content in files.items():
        write_atomically(folder / name, content)


def write_atomically(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def update_readme(readme: Path, markers: tuple[str, str], content: str) -> None:
    """Puts ``content`` between the two markers in ``readme``, whole lines."""
    begin, end = markers
    text = readme.read_text()
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{readme} must have one line {begin} and, below it, one line {end}")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    write_atomically(readme, f"{before}{begin}\n{content}{end}{after}".encode())


def readme_table(results: dict) -> str:
    env, table = results["environment"], results["costs"][0]
    caption = (
        f"{env['machine']}, threads {env['threads']}, {table['dtype']}, input {tuple(table['shape'])}, "
        f"PyTorch {env['torch']}; `{results['command']}`."
    )
    return "\n".join([caption, *cost_table(table), ""])


def folder_name(machine: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few and small sizes: two minutes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU (default: PyTorch's)")
    parser.add_argument(
        "--memory-limit", type=float, default=8.0, metavar="GB", help="of growth (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: benchmarks/results/<machine>")
    parser.add_argument("--render", type=Path, metavar="RESULTS.JSON", help="measure nothing, write from these numbers")
    parser.add_argument("--readme", type=Path, help="also put the cost table into this file, between its markers")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads must be at least 1; got {options.threads}")
        torch.set_num_threads(options.threads)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device} needs a GPU, and PyTorch sees none")
    try:
        if options.render:
            results = json.loads(options.render.read_text())
        else:
            command = shlex.join(
                ["python", "-m", "benchmarks.report", *(sys.argv[1:] if arguments is None else arguments)]
            )
            sizes = QUICK if options.quick else FULL
            results = measure(sizes, options.device, options.memory_limit * 1e9, command)
        folder = options.output or RESULTS / folder_name(results["environment"]["machine"])
        write(results, folder)
        if options.readme:
            update_readme(options.readme, MARKERS, readme_table(results))
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    for mode, grown in results["growth"].items():
        for name, block in grown.items():
            fitted = ["?" if p is None else f"{p:.2f}" for p in growth.exponents(block).values()]
            print(f"{mode}, {name}: time ∝ N^{fitted[0]}, memory ∝ N^{fitted[1]}; {block['stopped'] or 'to the end'}")
    print(f"{folder / 'report.md'}")


if __name__ == "__main__":
    main()
