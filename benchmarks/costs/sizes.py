"""Every size that is measured: ``FULL``, and ``QUICK`` for a first impression in two minutes."""

from typing import NamedTuple


class Sizes(NamedTuple):
    channels: tuple[int, ...]
    """C of `make bench`."""
    sides: tuple[int, ...]
    """H = W of `make bench`."""
    batches: tuple[int, ...]
    """B of `make bench`."""
    minutes: float
    """What `make bench` may take."""
    table: tuple[int, int, int, int]
    """(B, C, H, W) of the report's cost table."""
    large_side: int
    """H = W of the report's row about one very large input."""
    growth: tuple[int, ...]
    """H = W of the report's growth; N is their square."""
    growth_channels: int
    """C of the report's growth."""
    seconds: float
    """How long the report measures the calls of a table row, at least."""
    growth_seconds: float
    """How long the report measures each size in the growth, at least."""
    slowest: float
    """Seconds that one call may take in the report's growth."""


FULL = Sizes(
    channels=(256, 512),
    sides=(33, 65, 97, 129),
    batches=(1, 4),
    minutes=14,
    table=(1, 512, 65, 65),
    large_side=513,
    growth=(32, 56, 100, 178, 316, 562, 1000),
    growth_channels=512,
    seconds=10,
    growth_seconds=0.5,
    slowest=30,
)
QUICK = Sizes(
    channels=(512,),
    sides=(33, 65),
    batches=(1,),
    minutes=1.5,
    table=(1, 512, 33, 33),
    large_side=129,
    growth=(32, 56, 100),
    growth_channels=128,
    seconds=0.5,
    growth_seconds=0.2,
    slowest=1,
)
