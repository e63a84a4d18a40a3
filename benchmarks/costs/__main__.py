"""`make report`: measures what every block costs, and writes Markdown, plots and the raw numbers, a folder a machine.

::

    python -m benchmarks.costs                          # measure, write benchmarks/results/<machine>/
    python -m benchmarks.costs --only grid              # measure the cells of both units again, keep the rest
    python -m benchmarks.costs --render results.json    # write the same from numbers measured before
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from pathlib import Path

import torch

from benchmarks.costs.cost_plots import plot_costs, plot_grid, plot_growth
from benchmarks.costs.cost_tables import grid_markdown, markdown, readme_table
from benchmarks.costs.growth import exponents
from benchmarks.costs.measure_costs import measure_costs, measure_grid_alone
from benchmarks.costs.sizes import FULL, QUICK, Sizes
from benchmarks.environment import machine
from benchmarks.plot_style import png
from benchmarks.reporting import RESULTS, read_results, update_readme, write_files

README_MARKERS = ("<!-- cost table: begin -->", "<!-- cost table: end -->")
PARTS = ("command", "environment", "costs", "growth", "targets")
"""What ``results.json`` has, and the grid in most files."""


def write(results: dict, folder: Path) -> None:
    """The report's files into ``folder``."""
    files = {
        "results.json": (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode(),
        "report.md": (markdown(results) + "\n").encode(),
        "costs.png": png(plot_costs(results["costs"])),
        "growth.png": png(plot_growth(results["growth"], results["sizes"]["growth_channels"])),
    }
    if cells := results.get("grid", {}).get("cells"):
        files["grid.md"] = (grid_markdown(results) + "\n").encode()
        files["grid.png"] = png(plot_grid(cells))
    write_files(folder, files)


def folder_name(machine: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


def measured_again(folder: Path, sizes: Sizes, device: str, command: str) -> dict:
    """The results in ``folder``, with the grid measured anew.

    Raises:
        ValueError: if these results come from another machine.
        OSError: if there are none.
    """
    results = read_results(folder / "results.json", *PARTS)
    if results["environment"]["machine"] != machine(device):
        raise ValueError(f"{folder} must have results of {machine(device)}; got {results['environment']['machine']}")
    results["grid"] = measure_grid_alone(sizes, device, command)
    results["sizes"]["grid"] = sizes.grid._asdict()
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.costs", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few and small sizes: minutes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU (default: PyTorch's)")
    parser.add_argument(
        "--memory-limit", type=float, default=8.0, metavar="GB", help="of growth (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: benchmarks/results/<machine>")
    parser.add_argument("--render", type=Path, metavar="RESULTS.JSON", help="measure nothing, write from these numbers")
    parser.add_argument(
        "--only", choices=["grid"], help="measure this part alone, and put it into the results that the folder has"
    )
    parser.add_argument(
        "--readme",
        type=Path,
        help="also put a short cost table and the missed targets into this file, between its markers",
    )
    options = parser.parse_args(arguments)
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads must be at least 1; got {options.threads}")
        torch.set_num_threads(options.threads)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device} needs a GPU, and PyTorch sees none")
    if options.only and options.quick and not options.output:
        parser.error("--only with --quick needs --output, so that the cells of all sizes are kept")
    if options.only and options.render:
        parser.error("--only measures and --render does not: give one of them")
    try:
        if options.render:
            results = read_results(options.render, *PARTS)
        else:
            command = shlex.join(
                ["python", "-m", "benchmarks.costs", *(sys.argv[1:] if arguments is None else arguments)]
            )
            sizes = QUICK if options.quick else FULL
            if options.only:
                folder = options.output or RESULTS / folder_name(machine(options.device))
                results = measured_again(folder, sizes, options.device, command)
            else:
                results = measure_costs(sizes, options.device, options.memory_limit * 1e9, command)
        folder = options.output or RESULTS / folder_name(results["environment"]["machine"])
        write(results, folder)
        if options.readme:
            update_readme(options.readme, README_MARKERS, readme_table(results))
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    for mode, grown in results["growth"].items():
        for name, block in grown.items():
            fitted = ["?" if p is None else f"{p:.2f}" for p in exponents(block).values()]
            print(f"{mode}, {name}: time ∝ N^{fitted[0]}, memory ∝ N^{fitted[1]}; {block['stopped'] or 'to the end'}")
    print(f"{folder / 'report.md'}")


if __name__ == "__main__":
    main()
