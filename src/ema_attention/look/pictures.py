"""Pictures of attention maps. They need matplotlib: the extra ``ema-attention[plot]``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ema_attention.look.figure import NotebookFigure

__all__ = ["plot_attention_maps", "plot_em_stages"]

# Okabe and Ito, "Color Universal Design", 2008, with grey for black: every kind of colour vision tells them apart.
_COLOURS = ("#D55E00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#CC79A7", "#E69F00", "#404040")
# What later rounds of eight are mixed with, 0 for black and 1 for white, and how much of it.
_SHADES = ((0, 0.0), (1, 0.5), (0, 0.45), (1, 0.25), (0, 0.25), (1, 0.7), (0, 0.65), (1, 0.85))
_MOST_MAPS = 12  # of plot_attention_maps, unless it is told which
_MOST_STAGES = 6  # panels of plot_em_stages
_HIGHEST = 4  # times as high as wide: room for a panel, in which a higher photograph is narrow
_LONGEST_SIDE = 640  # pixels of the photograph: a panel shows no more, and there are many of them
_NUMBER_INCHES = 0.19  # from the number of a basis to the next, at least
_ROUNDING = 0.05  # of the sum of maps in bfloat16
_NEARLY_EVEN = 0.1  # a certainty: below it, no basis stands out


def plot_attention_maps(image: Any, z: Tensor, *, bases: Sequence[int] | None = None) -> NotebookFigure:
    """Draws the attention maps of one sample over its photograph.

    The panels are the photograph; maps, each over the photograph in grey and framed in the colour of its
    basis; and the hard assignment: every position in the colour of the basis with the largest z, and the
    number of that basis in its widest region, if there is room for it. The more evenly the bases share a
    position, the fainter its colours are; where that is so everywhere, the figure says it. There are eight
    colours: beyond K = 8 they come round again in other shades, and the numbers tell the bases apart. The maps
    have one colour scale, up to the largest value of all; they are taken to cover the whole photograph, and
    are interpolated to its size.

    Args:
        image: the photograph: a tensor (3, H, W) or (1, H, W), or anything that ``numpy.asarray`` makes
            (H, W) or (H, W, 3) of, uint8 or floating point from 0 to 1; or a PIL image, which becomes RGB.
        z: the maps of one sample, (K, h, w): ``em_attention(...).z[0]``, or ``maps[name][0]`` of those
            that :func:`collect_attention_maps` collects.
        bases: the numbers of those whose maps are drawn, in this order. By default those with the largest
            share, twelve at most, the largest first. The assignment is always of all.

    Returns:
        A ``matplotlib.figure.Figure`` that belongs to no window: ``figure.savefig(path)`` writes it, as does
        ``figure.save(path)``, and a notebook shows it. The title over a map is the number of its basis and its
        share of the image, the mean of the map. A position that took no part (z = 0 for every basis) has no
        colour.

    Raises:
        ImportError: without matplotlib.
        TypeError: for maps that are not a floating point tensor, or an image of another dtype.
        ValueError: for other shapes, for values that are not finite and from 0 to 1, for maps that do not sum to
            1, or to 0, at each position, and for bases that are not different numbers from 0 to K - 1.

    Example:
        >>> figure = plot_attention_maps(torch.rand(3, 48, 64), torch.randn(4, 6, 8).softmax(0), bases=[2, 0])
        >>> [ax.get_title().split(" · ")[0] for ax in figure.axes[:4]]
        ['photograph', 'basis 2', 'basis 0', 'hard assignment of all 4']
    """
    _need_matplotlib("plot_attention_maps")
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import PercentFormatter

    photo = as_photo(image)
    _check_maps(z, "K, H, W")
    z = z.detach().float().cpu()
    num_bases = len(z)
    shares = z.mean((1, 2))
    bases = bases.tolist() if isinstance(bases, Tensor) else bases
    shown = shares.argsort(descending=True, stable=True)[:_MOST_MAPS].tolist() if bases is None else list(bases)
    if not shown or len(set(shown)) < len(shown) or not set(shown) <= set(range(num_bases)) or bool in map(type, shown):
        raise ValueError(f"bases must be different numbers from 0 to {num_bases - 1}, one or more; got {bases}")
    say = _nearly_even(z)
    z = F.interpolate(z[None], photo.shape[:2], mode="bilinear")[0]
    aspect = min(photo.shape[0] / photo.shape[1], _HIGHEST)
    figure, (first, *middle, last, bar) = _lay_out(num_bases, len(shown), aspect, say)

    first.imshow(photo.squeeze(2).numpy(), cmap="gray", vmin=0, vmax=1)
    first.set_title("photograph")
    first.set_frame_on(False)
    opacity = (0.7 * certainty(z)).numpy()
    for k, ax in zip(shown, middle, strict=True):
        ax.imshow(photo.mean(2).numpy(), cmap="gray", vmin=0, vmax=1)
        heat = ax.imshow(z[k].numpy(), cmap="cividis", vmin=0, vmax=z.max().item(), alpha=opacity)
        ax.set_title(f"basis {k} · {shares[k]:.1%}")
        for spine in ax.spines.values():
            spine.set(color=colour_of_basis(k), linewidth=3)
    plain = ScalarMappable(heat.norm, heat.cmap)  # without the opacity of each position
    figure.colorbar(plain, cax=bar, label="attention z", alpha=0.7, format=PercentFormatter(1))
    draw_assignment(last, photo, z)
    last.set_title("hard assignment" + (f" of all {num_bases}" if len(shown) < num_bases else ""))
    return figure


def plot_em_stages(image: Any, z: Tensor, objective: Tensor) -> NotebookFigure:
    """Draws how the segments of one photograph form, stage by stage, and EM's objective on the way.

    The panels are the hard assignment, as :func:`plot_attention_maps` draws it, after the first stage, the last,
    and those between, six at most and ever farther apart; below them is the objective, from the bases at the
    start (stage 0) to those after each stage.

    Args:
        image: the photograph, as :func:`plot_attention_maps` takes it.
        z: the maps of each stage for one sample, (T, K, h, w): ``stages.z[:, 0]`` of :func:`em_stages`.
        objective: (T + 1,): ``stages.objective[:, 0]``.

    Returns:
        A ``matplotlib.figure.Figure`` as :func:`plot_attention_maps` returns it.

    Raises:
        ImportError: without matplotlib.
        TypeError, ValueError: as :func:`plot_attention_maps`, and for an objective of another length.

    Example:
        >>> z = torch.randn(15, 4, 6, 8).softmax(1)
        >>> figure = plot_em_stages(torch.rand(3, 48, 64), z, torch.linspace(1, 2, 16))
        >>> [ax.get_title() for ax in figure.axes[:-1]]
        ['stage 1', 'stage 2', 'stage 3', 'stage 5', 'stage 9', 'stage 15']
    """
    _need_matplotlib("plot_em_stages")
    from matplotlib.ticker import MaxNLocator

    from ema_attention.look.figure import NotebookFigure

    photo = as_photo(image)
    _check_maps(z, "T, K, H, W")
    if not isinstance(objective, Tensor):
        raise TypeError(f"objective must be a tensor; got {type(objective).__name__}")
    if objective.shape != (len(z) + 1,):
        raise ValueError(f"objective must be ({len(z) + 1},) for {len(z)} stages; got {tuple(objective.shape)}")
    if not objective.isfinite().all():
        raise ValueError(f"objective must be finite; got {objective.tolist()}")
    ratio = len(z) ** (1 / (_MOST_STAGES - 1))
    farther = {min(len(z), round(ratio**i)) for i in range(_MOST_STAGES)}
    shown = sorted(farther) if len(z) > _MOST_STAGES else list(range(1, len(z) + 1))

    height, width, _ = photo.shape
    left, gap, title, curve, below = 0.9, 0.12, 0.3, 1.6, 0.5  # inches, as all lengths here
    panel = max(1.75, 5 / len(shown), 0.65 * math.sqrt(z.shape[1]))  # K regions need room for their numbers
    columns = min(len(shown), int(16 / panel))
    rows = math.ceil(len(shown) / columns)
    row = title + panel * height / width
    total, tall = left + columns * (panel + gap), rows * row + title + curve + below
    figure = NotebookFigure((total, tall))
    for i, stage in enumerate(shown):
        x, y = left + i % columns * (panel + gap), tall - (i // columns + 1) * row
        ax = figure.add_axes((x / total, y / tall, panel / total, panel * height / width / tall))
        ax.set(xticks=[], yticks=[])
        maps = F.interpolate(z[stage - 1][None].detach().float().cpu(), (height, width), mode="bilinear")[0]
        draw_assignment(ax, photo, maps)
        ax.set_title(f"stage {stage}")
    ax = figure.add_axes((left / total, below / tall, (total - left - gap) / total, curve / tall))
    ax.plot(objective.detach().float().cpu().numpy(), color=_COLOURS[4], marker="o", markersize=4, clip_on=False)
    ax.vlines(shown, *ax.get_ylim(), color="0.6", linewidth=0.8, linestyle=":", zorder=0)
    ax.set(xlabel="EM stage", ylabel="objective J", xlim=(0, len(z)), ylim=ax.get_ylim())
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def _need_matplotlib(function: str) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{function} needs matplotlib: pip install "ema-attention[plot]"') from error


def draw_assignment(ax: Axes, photo: Tensor, z: Tensor) -> None:
    """The strongest basis of every position of z (K, H, W) over the grey photograph, numbered where there is room."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patheffects import withStroke

    ax.set_frame_on(False)
    ax.imshow(photo.mean(2).numpy(), cmap="gray", vmin=0, vmax=1)
    colours = ListedColormap([colour_of_basis(k) for k in range(len(z))])
    takes_part = z.sum(0) > 0.5  # halfway between a position that does (1) and one that does not (0)
    assignment = z.argmax(0).to(z.dtype).where(takes_part, torch.nan)
    certain = certainty(z)
    opacity = (0.8 * certain).numpy()
    ax.imshow(assignment.numpy(), cmap=colours, vmin=-0.5, vmax=len(z) - 0.5, alpha=opacity, interpolation="nearest")
    outline = withStroke(linewidth=2, foreground="white")
    reach = math.ceil(_NUMBER_INCHES * photo.shape[1] * ax.figure.dpi / ax.get_window_extent().width)
    is_free = torch.ones_like(z[0])
    regions = ((assignment == k) & (certain >= _NEARLY_EVEN) for k in range(len(z)))
    for k, region in sorted(enumerate(regions), key=lambda one: -int(one[1].sum())):
        place = _widest_place(region.float(), is_free)
        if place is None:  # other numbers take all of it
            continue
        y, x = place
        ax.text(x, y, str(k), ha="center", va="center", size=9, weight="bold", path_effects=[outline])
        is_free[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1] = 0


def certainty(z: Tensor) -> Tensor:
    """How little the bases share each position of maps z (K, *spatial).

    It is 0 where all have 1/K of it, or none any, and 1 where one has all of it: 1 + log(max z) / log K.
    """
    most = z.amax(0)
    return most if len(z) == 1 else 1 + most.clamp(1 / len(z), 1).log() / math.log(len(z))


def _nearly_even(z: Tensor) -> str | None:
    """What to say of maps (K, H, W) in which there is nothing to see."""
    takes_part = z.sum(0) > 0.5
    if not takes_part.any() or certainty(z)[takes_part].mean() >= _NEARLY_EVEN:
        return None
    most = z.amax(0)[takes_part].mean()
    return (
        f"Nothing to see: the bases are nearly equal. The strongest explains {most:.2%} of a position, an even share\n"
        f"is {1 / len(z):.2%}. So it is with a unit that is not trained, and with a scale that is too low."
    )


def as_photo(image: Any) -> Tensor:
    """The image as float (H, W, 3) or (H, W, 1), no larger than a panel shows."""
    import numpy as np
    from PIL import Image

    if isinstance(image, Image.Image) and not image.mode.startswith(("I", "F")):  # those have no range to convert from
        image = image.convert("RGB")
    if isinstance(image, Tensor):
        photo = image.detach().cpu()
        fits = photo.dim() == 3 and len(photo) in (1, 3)
        photo = photo.movedim(0, -1) if fits else photo
    else:
        array = np.array(image)
        if array.dtype != np.uint8 and array.dtype.kind != "f":
            got = array.dtype if array.dtype.kind in "biuc" else type(image).__name__
            raise TypeError(f"image must be uint8 or floating point; got {got}")
        photo = torch.from_numpy(array if array.dtype == np.uint8 else array.astype(np.float32))
        photo = photo[..., None] if photo.dim() == 2 else photo
        fits = photo.dim() == 3 and photo.shape[2] in (1, 3)
    if not fits or not photo.numel():
        raise ValueError(
            "image must be a tensor (3, H, W) or (1, H, W), or an array (H, W) or (H, W, 3); "
            f"got {type(image).__name__} {tuple(np.shape(image))}"
        )
    if photo.dtype == torch.uint8:
        photo = photo / 255
    elif not photo.is_floating_point():
        raise TypeError(f"image must be uint8 or floating point; got {photo.dtype}")
    photo = photo.float()
    hint = " (a model's input is normalised: give the image before that)" if photo.min() < 0 else ""
    check_from_0_to_1("image", photo, hint)
    shrink = _LONGEST_SIDE / max(photo.shape[:2])
    if shrink < 1:
        size = [max(1, round(shrink * side)) for side in photo.shape[:2]]
        photo = F.interpolate(photo.movedim(-1, 0)[None], size, mode="bilinear", antialias=True)[0].movedim(0, -1)
    return photo.clamp(0, 1)


def _check_maps(z: Tensor, dimensions: str) -> None:
    if not isinstance(z, Tensor):
        raise TypeError(f"z must be a tensor; got {type(z).__name__}")
    if not z.is_floating_point():
        raise TypeError(f"z must be of a floating point dtype; got {z.dtype}")
    if z.dim() != len(dimensions.split()) or not z.numel():
        raise ValueError(f"z must be ({dimensions}), one sample of the maps; got {tuple(z.shape)}")
    check_from_0_to_1("z", z)
    sums = z.detach().float().sum(-3)
    is_whole = ((sums - 1).abs() < _ROUNDING) | (sums < _ROUNDING)
    if not is_whole.all():
        raise ValueError(
            f"z must sum to 1 over the K bases at each position, or to 0; got a sum of {sums[~is_whole][0]:.4g}: "
            f"is one dimension missing in {tuple(z.shape)}?"
        )


def check_from_0_to_1(name: str, values: Tensor, hint: str = "") -> None:
    low, high = (value.item() for value in values.aminmax())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # written so that NaN does not pass
        raise ValueError(f"{name} must have values from 0 to 1; got {low:.4g} to {high:.4g}{hint}")


def colour_of_basis(k: int) -> tuple[float, float, float]:
    """Red, green and blue from 0 to 1."""
    other, amount = _SHADES[k // len(_COLOURS) % len(_SHADES)]
    colour = bytes.fromhex(_COLOURS[k % len(_COLOURS)][1:])
    red, green, blue = (amount * other + (1 - amount) * part / 255 for part in colour)
    return red, green, blue


def _lay_out(num_bases: int, maps: int, aspect: float, say: str | None) -> tuple[NotebookFigure, list[Axes]]:
    """A figure with a sentence below; and the axes of the photograph, of each map, of the assignment, of the bar.

    A grid of cells for panels that are ``aspect`` times as high as wide. All lengths are inches.
    """
    from ema_attention.look.figure import NotebookFigure

    side = 1 if num_bases <= _MOST_MAPS else 2  # the assignment takes side × side cells: K regions need room
    cells = maps + 1 + side**2
    columns = max(4, math.ceil(math.sqrt(cells)))
    columns = cells if cells <= 6 and side == 1 else min(columns, columns + 1, key=lambda number: -cells % number)
    rows = max(side, math.ceil(cells / columns))
    cell_width = max(1.75, 10.4 / columns)  # the longest title is 1.6 wide
    title, gap, right, below = 0.3, 0.12, 0.95, 0.5 if say else 0.0
    cell_height = (cell_width - gap) * aspect + gap + title
    width, height = columns * cell_width + right, rows * cell_height + below
    figure = NotebookFigure((width, height))

    def axes(row: int, column: int, side: int = 1) -> Axes:
        left, top = column * cell_width + gap / 2, height - row * cell_height - title
        size = (side * cell_width - gap, side * cell_height - gap - title)
        ax = figure.add_axes((left / width, (top - size[1]) / height, size[0] / width, size[1] / height))
        ax.set(xticks=[], yticks=[], anchor="N")
        return ax

    corner = (rows - side, columns - side)
    grid = [divmod(cell, columns) for cell in range(rows * columns)]
    free = [(row, column) for row, column in grid if row < corner[0] or column < corner[1]]
    panels = [axes(row, column) for row, column in free[: maps + 1]]
    panels.append(axes(*corner, side))
    left, bottom = width - right + 0.05, below + gap
    panels.append(figure.add_axes((left / width, bottom / height, 0.13 / width, 1 - (title + bottom) / height)))
    if say:
        figure.text(0.5, 0.06 / height, say, ha="center", va="bottom", size=11)
    return figure, panels


def _widest_place(region: Tensor, is_free: Tensor) -> tuple[int, int] | None:
    """The position (y, x) of a region (H, W), 1 inside and 0 outside, that has the most of the region around it.

    Of those positions that are free, (H, W), 1 or 0; None if the region has none.
    """
    window = max(3, min(region.shape) // 8 | 1)
    around = F.avg_pool2d(region[None], (window, 1), 1, (window // 2, 0))
    around = F.avg_pool2d(around, (1, window), 1, (0, window // 2))[0] * region * is_free
    y, x = divmod(int(around.argmax()), region.shape[1])
    return (y, x) if around[y, x] > 0 else None
