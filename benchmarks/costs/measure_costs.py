"""Everything that the cost report says, measured."""

from __future__ import annotations

import torch
from tqdm import tqdm

from benchmarks.blocks import BLOCKS
from benchmarks.costs import growth, paper_costs, targets
from benchmarks.costs.grid import cells, measure_grid
from benchmarks.costs.sizes import Sizes
from benchmarks.costs.unit_pairs import wrong_units
from benchmarks.environment import environment
from benchmarks.measure import MODES, failure, held_for_backward, interleaved, memory, parameters, prepare, summary

BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} {elapsed} {postfix}"


def measure_costs(sizes: Sizes, device: str, bytes_limit: float, command: str) -> dict:
    """The numbers of the report, in the form that ``results.json`` has. ``bytes_limit`` is that of growth."""
    withheld = {name: reason for name, block in BLOCKS.items() if (reason := failure(block, device))}
    dtypes = [torch.float32, torch.bfloat16] if torch.device(device).type == "cuda" else [torch.float32]
    blocks = [name for name in BLOCKS if name not in withheld]
    grown = {mode: [n for n in blocks if not (mode == "forward" and BLOCKS[n].forward_of)] for mode in MODES}
    steps = 2 + len(dtypes) * len(MODES) + sum(map(len, grown.values()))
    steps += len(cells(sizes.grid, device))
    with tqdm(total=steps, bar_format=BAR) as progress:

        def say(what: str) -> None:
            progress.set_postfix_str(what)

        results: dict = {
            "environment": environment(device),
            "command": command,
            "memory_limit": bytes_limit,
            "sizes": {**sizes._asdict(), "grid": sizes.grid._asdict()},
            "withheld": withheld,
        }
        wrong = wrong_units(device)
        results["targets"] = {"withheld": wrong} if wrong else targets.measure_targets(sizes, device, say)
        progress.update()
        results["grid"] = measure_grid(sizes.grid, device, progress, command)
        results["costs"] = []
        for dtype in dtypes:
            results["costs"].append(measure_blocks(blocks, sizes, dtype, device, progress))
        say("the paper's table")
        results["paper"] = paper_costs.count()
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


def measure_blocks(blocks: list[str], sizes: Sizes, dtype: torch.dtype, device: str, progress: tqdm) -> dict:
    """What each of ``blocks`` costs at the size of the table, timed in turns."""
    _, channels, height, width = sizes.table
    modules = {name: BLOCKS[name].make(channels) for name in blocks}
    rows: dict[str, dict] = {
        name: {"parameters": parameters(module), "macs": BLOCKS[name].macs_on(device, channels, height, width)}
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


def measure_grid_alone(sizes: Sizes, device: str, command: str) -> dict:
    """``grid`` of :func:`measure_costs`, without the rest."""
    with tqdm(total=len(cells(sizes.grid, device)), bar_format=BAR) as progress:
        return measure_grid(sizes.grid, device, progress, command)
