"""The growth of a block: where it stops, and its exponents."""

import pytest

from benchmarks.blocks import BLOCKS
from benchmarks.costs import growth
from benchmarks.measure import memory, prepare


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
