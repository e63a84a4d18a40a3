"""Hypothesis strategies for EM problems, and the tolerances a dtype deserves."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

UNIT_NORM_TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-12}


@dataclass
class Problem:
    x: Tensor
    mu: Tensor
    stages: int
    scale: float
    mask: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @property
    def options(self) -> dict[str, object]:
        return {"scale": self.scale, "mask": self.mask, "weight": self.weight, "bias": self.bias}


@st.composite
def problems(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
    magnitudes: tuple[float, ...] = (1.0,),
    degenerate: bool = False,
    masked: bool | None = None,
    projected: bool | None = None,
) -> Problem:
    """EM problems over layouts (1D, 2D, 3D), sizes, masks, scales and projections; None for with and without."""
    batch, channels, inner, bases = (draw(st.integers(1, top)) for top in (3, 9, 9, 6))
    spatial = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dtype = draw(st.sampled_from(dtypes))
    masked = draw(st.booleans()) if masked is None else masked
    projected = draw(st.booleans()) if projected is None else projected
    x = normal(batch, channels, *spatial) * draw(st.sampled_from(magnitudes))
    if degenerate:
        kind = draw(st.sampled_from(["zeros", "constant", "one position", "ordinary"]))
        if kind == "zeros":
            x = torch.zeros_like(x)
        elif kind == "constant":
            x = x[:, :, :1].expand_as(x).clone() if x.dim() == 3 else torch.ones_like(x)
        elif kind == "one position":
            x.flatten(2)[..., 1:] = 0
    mask = torch.rand(batch, *spatial, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    mu = F.normalize(
        normal(*draw(st.sampled_from([(), (1,), (batch,)])), inner if projected else channels, bases), dim=-2
    )
    weight = normal(inner, channels) if projected else None
    bias = normal(inner) if projected and draw(st.booleans()) else None
    return Problem(
        x.to(dtype),
        mu.to(dtype),
        draw(st.integers(1, 4)),
        draw(st.sampled_from([0.1, 1.0, 7.0])),
        mask if masked else None,
        None if weight is None else weight.to(dtype),
        None if bias is None else bias.to(dtype),
    )
