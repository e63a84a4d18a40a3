"""What the reports are written with: folder, files, Markdown tables, times in milliseconds, the README's tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from examples._common.files import written_whole

RESULTS = Path(__file__).parent / "results"
"""A folder for each report."""


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Writes each file whole or not at all."""
    for name, content in files.items():
        with written_whole(folder / name) as file:
            file.write(content)


def read_results(path: Path, *keys: str) -> dict[str, Any]:
    """The dict in a JSON file that a benchmark has written.

    Raises:
        ValueError: with the file's name, for one that is no such file, or lacks one of the keys.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must hold a benchmark's results, as JSON: {error}") from None
    if not isinstance(results, dict) or not set(keys) <= results.keys():
        got = ", ".join(results) if isinstance(results, dict) else f"a {type(results).__name__}"
        raise ValueError(f"{path} must hold results with {', '.join(keys)}; got {got or 'nothing'}")
    return results


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table: the first column left, the others right."""
    align = ["---"] + ["---:"] * (len(head) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (head, align, *rows)]


SHORT = (1e-3, 1e-2, 1e-1)
"""The ``limits`` of :func:`milliseconds` for times of which some are far below 10 ms."""


def milliseconds(times: dict, limits: tuple[float, ...] = (1e-1,)) -> str:
    """Median [quartiles] of a :func:`benchmarks.measure.summary`, a decimal for each of the limits that it is below."""
    low, high = times["quartiles"]
    digits = sum(times["median"] < limit for limit in limits)
    return f"{1e3 * times['median']:,.{digits}f} [{1e3 * low:,.{digits}f}–{1e3 * high:,.{digits}f}]"


def update_readme(readme: Path, markers: tuple[str, str], content: str) -> None:
    """Puts ``content`` between the two markers in ``readme``, whole lines.

    Raises:
        ValueError: if either marker is missing or there more than once, if the second stands above the first, or if the
            file cannot be written.
    """
    begin, end = markers
    text = readme.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise ValueError(f"{readme} must have one line {begin} and, below it, one line {end}")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    with written_whole(readme) as file:
        file.write(f"{before}{begin}\n{content}{end}{after}".encode())
