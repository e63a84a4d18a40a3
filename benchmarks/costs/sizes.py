"""Every size that is measured: ``FULL``, and ``QUICK`` for a first impression in minutes."""

from typing import NamedTuple

MEBIBYTE = 2**20


class Grid(NamedTuple):
    """The cells where the two units are compared."""

    sides: tuple[int, ...]
    """H = W of images. Tokens are as many: N = H·W."""
    batches: tuple[int, ...]
    channels: tuple[int, ...]
    """C of images."""
    token_channels: tuple[int, ...]
    """C of tokens."""
    precisions: tuple[str, ...]
    """Of ``unit_pairs.Precision``."""
    seconds: float
    """How long each cell is measured, at least."""
    least: int = 5
    """How many rounds each cell is measured, at least."""
    largest_input: int = 64 * MEBIBYTE
    """Bytes of x in float32; a cell with a larger one is left out."""
    largest_input_on_gpu: int = 512 * MEBIBYTE
    compiled_sides: tuple[int, ...] = ()
    """H = W of images for which both units are also measured compiled, on a GPU; see ``compiled_channels``."""
    compiled_channels: tuple[int, ...] = ()


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
    grid: Grid
    """Of the report's cells of EMAUnit compared with the published unit."""


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
    grid=Grid(
        sides=(7, 14, 16, 32, 65, 129),
        batches=(1, 8, 32),
        channels=(256, 512),
        token_channels=(768,),
        precisions=("float32", "bfloat16 model", "bfloat16 autocast"),
        seconds=1.0,
        compiled_sides=(16, 65),
        compiled_channels=(512,),
    ),
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
    grid=Grid(
        sides=(7, 16, 32),
        batches=(1, 8),
        channels=(512,),
        token_channels=(768,),
        precisions=("float32", "bfloat16 model"),
        seconds=0.2,
    ),
)
