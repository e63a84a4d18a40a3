"""The sharded example on two processes: its differences, and the numbers that it sends."""

import contextlib
import io
import re
import sys
from pathlib import Path

import pytest

from examples import sharded_attention
from tests.ranks import run_on_ranks


def run_the_example() -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        sharded_attention.run(channels=8, height=9, width=16, bases=4, stages=3)
    return text.getvalue()


def test_the_example_prints_the_communication_beside_that_of_ring_attention(tmp_path: Path) -> None:
    text, nothing = run_on_ranks(run_the_example, 2, tmp_path)
    assert nothing == ""
    differences = [float(number) for number in re.findall(r"\d\.\de[-+]\d+", text)]
    assert len(differences) == 2
    assert max(differences) < 1e-5
    assert f"3 forward, 3 backward, of {4 * (8 + 1) * 4} bytes" in text
    keys_and_values, sums = 2 * 9 * 16 * 8 * 4 / 2, 3 * 4 * (8 + 1) * 4
    assert f"{keys_and_values / sums:9.0f}x" in text


@pytest.mark.parametrize("ranks", [None, "1", "10"])
def test_a_number_of_processes_that_cannot_share_the_rows_is_refused(
    ranks: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sharded_attention", "--height", "9"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("WORLD_SIZE", ranks)
    with pytest.raises(SystemExit):
        sharded_attention.main()
    assert f"from 2 processes to one for each row, 9; got {ranks or 1}\n" in capsys.readouterr().err
