"""The explorer: EM attention as one HTML page to look into. It needs the extra ``ema-attention[plot]``."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ema_attention._checks import check_integer
from ema_attention.look.pictures import as_photo, check_from_0_to_1, colour_of_basis
from ema_attention.look.stages import EMStages, em_stages_together, model_stages, model_stages_together

__all__ = ["explore_attention", "explore_features", "explore_stages"]

_MOST_POSITIONS = 10_000  # of the maps of one unit over one image; of more, each slice is averaged in blocks
_MOST_POINTS = 1000  # of the line of a signal
_LEVELS = 4095  # 12 bits: exact to the digit that the page shows
_STRONGEST = 5  # positions of a basis that are listed


class Page(str):
    """The explorer's HTML, a string. A notebook shows the page itself."""

    def save(self, path: str | Path) -> None:
        """Writes the page into a file."""
        Path(path).write_text(self, encoding="utf-8")

    def __repr__(self) -> str:
        return f"<the explorer's page, {len(self) / 1e6:.1f} MB>"  # a notebook keeps this too

    def _repr_html_(self) -> str:
        # A document of its own: neither's styles and scripts reach the other.
        return (
            f'<iframe srcdoc="{html.escape(self)}" sandbox="allow-scripts allow-downloads" '
            'title="EM attention explorer" style="width:100%;height:900px;border:0"></iframe>'
        )


def explore_attention(
    model: nn.Module,
    x: Tensor | Sequence[Tensor],
    images: Iterable[Any],
    *,
    names: Sequence[str] | None = None,
    grid: tuple[int, int] | None = None,
    together: int = 0,
) -> Page:
    """Runs ``model`` and returns a page that shows what every :class:`EMAUnit` in it attends to, stage by stage.

    The page is one HTML file that loads nothing, from nowhere. It shows each image with the maps of each unit
    over it: the bases that explain a position and how much; the map of a basis, its share of the image, its
    strongest positions; EM's stages, with the objective. The maps are rounded to 1/4095 of the basis's
    largest value; where a unit has more than 10,000 positions, those of each slice are averaged in blocks (an
    image is one slice). The model runs as in :func:`model_stages`.

    Args:
        model: a model with one unit or more.
        x: what it takes, (B, ...), or several of these, run one after the other: for images of several sizes.
        images: what to show for each sample of x: for maps in two dimensions a photograph as
            :func:`plot_attention_maps` takes it; for one dimension a signal (L,) or (C, L); for three a volume or
            a video (D, H, W) or (C, D, H, W), C being 1 or 3, with values like a photograph's. The maps are
            taken to cover the whole image.
        names: of the images.
        grid: (h, w), for tokens of photographs: maps in one dimension are laid out so, and others stay as they
            are. Tokens before the last h·w, such as a class token, are not shown.
        together: EM's stages over the positions of all samples, before the unit's own in each of them. With 0
            each starts from the unit's bases, and the page shows what the model computes. With more, the number
            of a basis stands for the same thing in more of the images, and the maps are not the model's.

    Returns:
        The page, a string. ``page.save("page.html")`` writes it, and a notebook shows it.

    Raises:
        ImportError: without numpy or Pillow.
        TypeError, ValueError: for a model in which no unit runs, maps or an objective that are not finite, images
            that do not fit the maps, names that are not strings, a grid that is not two positive integers,
            ``together`` below 0.

    Example:
        >>> from ema_attention import EMAUnit
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), EMAUnit(8, num_bases=4))
        >>> photos = torch.rand(2, 3, 24, 32)
        >>> page = explore_attention(model, photos, photos, names=["left", "right"])
        >>> page[:15]
        '<!doctype html>'
    """
    _need_numpy_and_pillow()
    if grid is not None and not (
        isinstance(grid, Sequence) and len(grid) == 2 and all(isinstance(side, int) and side > 0 for side in grid)
    ):
        raise ValueError(f"grid must be (h, w), two positive integers; got {grid!r}")
    _check_together(together)
    batches = [x] if isinstance(x, Tensor) else x
    if together:
        stages = model_stages_together(model, batches, together)
    else:
        stages = [model_stages(model, batch) for batch in batches]  # one batch in memory at a time
    return explore_stages([_on_grid(batch, grid) for batch in stages], images, names=names)


def explore_features(
    x: Tensor | Sequence[Tensor],
    mu: Tensor,
    images: Iterable[Any],
    *,
    stages: int = 3,
    together: int = 12,
    scale: float = 1.0,
    names: Sequence[str] | None = None,
) -> Page:
    r"""The page of :func:`explore_attention` for features, without a model.

    EM runs over the positions of all samples together, and then a few stages in each. So the same number and
    colour stand for the same thing in every image. Of a sample alone all these stages are shown.

    Args:
        x: features (B, C, \*spatial), or several of these, for images of several sizes.
        mu: the bases to start from, (C, K).
        images: one for each sample, as :func:`explore_attention` takes them.
        stages: of EM in each sample, those that the page shows.
        together: EM's stages over all samples, before. With 0, each sample starts from mu.
        scale: sharpness of the E-step. For features of length 1, take about 10: with 1 the bases stay nearly equal.
        names: of the images.

    Returns:
        The page.

    Raises:
        ImportError, TypeError, ValueError: as :func:`explore_attention` and :func:`em_stages`, and for bases of
            another shape.

    Example:
        >>> x = torch.nn.functional.normalize(torch.randn(2, 16, 6, 8), dim=1)
        >>> page = explore_features(x, x[0, :, 0, :4], torch.rand(2, 3, 48, 64), scale=10.0)
        >>> page.save("explorer.html")  # doctest: +SKIP
    """
    _check_together(together)
    if isinstance(mu, Tensor) and mu.dim() != 2:
        raise ValueError(f"mu must be (C, K), the start of every sample; got {tuple(mu.shape)}")
    batches = [x] if isinstance(x, Tensor) else list(x)
    if not batches:
        raise ValueError("x must be features of one sample or more; got none")
    return explore_stages(em_stages_together(batches, mu, stages, together, scale), images, names=names)


def explore_stages(
    stages: EMStages | Mapping[str, EMStages] | Sequence[EMStages | Mapping[str, EMStages]],
    images: Iterable[Any],
    *,
    names: Sequence[str] | None = None,
) -> Page:
    """The page of :func:`explore_attention` for stages that are there already.

    Args:
        stages: of B samples, from :func:`em_stages`; or of each unit by its name, from :func:`model_stages`; or
            several of these, for images of several sizes.
        images: one for each sample.
        names: of the images.

    Returns:
        The page.

    Raises:
        ImportError, TypeError, ValueError: as :func:`explore_attention`, and for stages of no sample, of other
            shapes or types, or of different samples for different units.

    Example:
        >>> from ema_attention import em_stages
        >>> mu = torch.nn.functional.normalize(torch.randn(16, 4), dim=0)
        >>> page = explore_stages(em_stages(torch.randn(1, 16, 6, 8), mu, stages=10), [torch.rand(3, 48, 64)])
    """
    _need_numpy_and_pillow()
    batches = stages if isinstance(stages, Sequence) and not isinstance(stages, EMStages) else [stages]
    samples = [sample for batch in batches for sample in _samples(batch)]
    if not samples:
        raise ValueError("stages must be of one sample or more; got none")
    images = list(images)
    names = [f"image {i}" for i in range(len(images))] if names is None else names
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names must be a list of strings; got {names!r}")
    if not len(samples) == len(images) == len(names):
        raise ValueError(
            f"images and names must be as many as the samples, {len(samples)}; got {len(images)} images "
            f"and {len(names)} names"
        )
    pictures: dict[tuple[int, int, int], dict[str, Any]] = {}  # by image, dimensions of the maps and slices
    views = []
    for i, sample in enumerate(samples):
        for unit, (z, objective) in sample.items():
            of = f"{unit!r} over {names[i]}" if unit else names[i]
            view = _view(z, objective, of)
            key = (i, z.dim() - 2, view["size"][0])
            if key not in pictures:
                pictures[key] = _picture(images[i], *key[1:], names[i])
            views.append({**view, "unit": unit, "image": i, "picture": list(pictures).index(key)})
    most = max(view["bases"] for view in views)
    colours = ["#" + bytes(round(255 * part) for part in colour_of_basis(k)).hex() for k in range(most)]
    data = {"views": views, "pictures": list(pictures.values()), "names": list(names), "colours": colours}
    template = resources.files("ema_attention.look").joinpath("explorer.html").read_text(encoding="utf-8")
    # No tag can begin inside the data: a name may hold anything.
    content = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return Page(template.replace("{{data}}", content))


def _check_together(together: Any) -> None:
    check_integer("together", together)
    if together < 0:
        raise ValueError(f"together must be at least 0; got {together}")


def _need_numpy_and_pillow() -> None:
    try:
        import numpy  # noqa: F401
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError('the explorer needs numpy and Pillow: pip install "ema-attention[plot]"') from error


def _on_grid(stages: Mapping[str, EMStages], grid: tuple[int, int] | None) -> dict[str, EMStages]:
    laid_out = dict(stages)
    for name, (z, objective) in stages.items():
        if grid is None or z.dim() != 4:
            continue
        tokens = math.prod(grid)
        if tokens > z.shape[3]:
            raise ValueError(f"grid must be of at most the {z.shape[3]} tokens of {name!r}; got {grid}")
        laid_out[name] = EMStages(z[..., -tokens:].unflatten(3, grid), objective)
    return laid_out


def _samples(stages: EMStages | Mapping[str, EMStages]) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """For each sample, by unit, its maps (T, K, *spatial) and its objective (T + 1,)."""
    units = stages if isinstance(stages, Mapping) else {"": stages}
    columns = []
    for name, unit in units.items():
        of = f" of {name!r}" if name else ""
        if not isinstance(unit, EMStages):
            raise TypeError(
                f"stages{of} must be EMStages, as em_stages and model_stages return them; got {type(unit).__name__}"
            )
        z, objective = unit
        for part in unit:
            if not isinstance(part, Tensor):
                raise TypeError(f"stages{of} must be tensors; got {type(part).__name__}")
        if z.dim() < 3 or not z.numel() or objective.shape != (len(z) + 1, z.shape[1]):
            raise ValueError(
                f"stages{of} must be z (T, B, K, *spatial) and objective (T + 1, B), with no dimension of 0; "
                f"got {tuple(z.shape)} and {tuple(objective.shape)}"
            )
        columns.append([(name, (z[:, b].float().cpu(), objective[:, b])) for b in range(z.shape[1])])
    if len({len(column) for column in columns}) > 1:
        batches = {name: unit.z.shape[1] for name, unit in units.items()}
        raise ValueError(f"every unit must have the same samples; got {batches}")
    return [dict(row) for row in zip(*columns, strict=True)]


def _view(z: Tensor, objective: Tensor, of: str) -> dict[str, Any]:
    """What the page knows of the maps z (T, K, *spatial) of one unit over one image."""
    if not 3 <= z.dim() <= 5:
        raise ValueError(f"the maps of {of} must have one to three spatial dimensions; got {z.dim() - 2}")
    check_from_0_to_1(f"the maps of {of}", z)
    if not objective.isfinite().all():
        raise ValueError(f"the objective of {of} must be finite; got {objective.tolist()}")
    share = z.flatten(2).mean(2)
    flat = z.dim() == 3
    z = z.view(*z.shape[:2], *(1,) * (5 - z.dim()), *z.shape[2:])  # (T, K, slices, rows, columns)
    excess = z[0, 0].numel() / _MOST_POSITIONS
    block = max(1, math.ceil(excess if flat else math.sqrt(excess)))
    if block > 1:
        # Evenly, as the page draws them: the last block is as wide as the others.
        blocks = (math.ceil(z.shape[3] / block), math.ceil(z.shape[4] / block))
        z = F.adaptive_avg_pool2d(z.flatten(0, 1), blocks).unflatten(0, z.shape[:2])
    stages, bases, *size = z.shape
    peak = z.amax((0, 2, 3, 4)).clamp_min(torch.finfo(z.dtype).tiny)
    levels = (z / peak.view(-1, 1, 1, 1) * _LEVELS).round().int()
    levels[1:] -= levels[:-1].clone()  # the stages of EM differ less and less
    planes = torch.stack([levels >> 8, levels]).byte()  # modulo 65536; apart, high bytes compress well
    return {
        "size": size,
        "block": block,
        "bases": bases,
        "stages": stages,
        "peak": peak.tolist(),
        "share": [[round(value, 6) for value in values] for values in share.tolist()],
        "objective": objective.tolist(),
        "strongest": [_strongest(maps) for maps in z],
        "levels": base64.b64encode(zlib.compress(planes.numpy().tobytes(), 9)).decode(),
    }


def _strongest(z: Tensor) -> list[list[int]]:
    """For each map of z (K, slices, rows, columns), its strongest positions that lie apart, at least half as strong."""
    places = torch.cartesian_prod(*(torch.arange(length, device=z.device) for length in z.shape[1:])).float()  # (N, 3)
    apart = max(z.shape[1:]) / 8
    left = z.flatten(1).clone()  # (K, N)
    enough = left.amax(1) / 2
    found = []
    for _ in range(_STRONGEST):
        values, chosen = left.max(1)
        found.append(chosen.where((values >= enough) & (values > 0), -1))
        left[torch.cdist(places[chosen], places) <= apart] = 0
    return [[n for n in row if n >= 0] for row in torch.stack(found, 1).tolist()]


def _picture(image: Any, dimensions: int, slices: int, name: str) -> dict[str, Any]:
    """A photograph for each slice, or the line of a signal."""
    if dimensions == 2:
        return {"frames": [_data_uri(as_photo(image))]}
    values = _tensor(image)
    if dimensions == 1:
        if values.dim() not in (1, 2) or not values.numel() or not values.isfinite().all():
            raise ValueError(
                f"{name} must be a finite signal (L,) or (C, L) for maps in one dimension (or give the grid of the "
                f"tokens of a photograph); got {tuple(values.shape)}"
            )
        return {"lines": _lines(values.view(-1, values.shape[-1]).double())}  # the range of float32 may overflow it
    values = values[None] if values.dim() == 3 else values
    if values.dim() != 4 or len(values) not in (1, 3) or not values.numel():
        raise ValueError(
            f"{name} must be a volume (D, H, W), (1, D, H, W) or (3, D, H, W) for maps in three dimensions; "
            f"got {tuple(values.shape)}"
        )
    frames = [int((i + 0.5) * values.shape[1] / slices) for i in range(slices)]
    return {"frames": [_data_uri(as_photo(values[:, frame])) for frame in frames]}


def _tensor(image: Any) -> Tensor:
    import numpy as np

    if isinstance(image, Tensor):
        values = image.detach().cpu()
    else:
        array = np.array(image)
        values = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    if values.is_complex():
        raise TypeError(f"an image must be of real numbers; got {values.dtype}")
    return values


def _lines(signal: Tensor) -> list[list[float]]:
    """The channels of a signal (C, L) from 0 to 1, long ones by the extremes of their stretches."""
    low, high = signal.aminmax()
    signal = (signal - low) / (high - low).clamp_min(torch.finfo(signal.dtype).tiny)
    if signal.shape[1] > _MOST_POINTS:
        stretches = _MOST_POINTS // 2
        extremes = (F.adaptive_max_pool1d(signal, stretches), -F.adaptive_max_pool1d(-signal, stretches))
        signal = torch.stack(extremes, 2).flatten(1)
    return [[round(value, 4) for value in line] for line in signal.tolist()]


def _data_uri(photo: Tensor) -> str:
    """A photograph (H, W, 1 or 3), from 0 to 1, as JPEG."""
    from PIL import Image

    buffer = io.BytesIO()
    pixels = (photo * 255).round().byte().expand(-1, -1, 3)
    Image.fromarray(pixels.numpy()).save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
