"""EM attention of samples that are larger than memory, one tile of positions at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ema_attention._checks import check_arguments, check_dtype, check_tensor
from ema_attention._layout import flatten
from ema_attention._steps import Problem, expectation, maximization, prepare, statistics
from ema_attention._torch import at_least_float32, without_autocast
from ema_attention.functional import EMAttention, reconstruction

__all__ = ["TiledEMAttention"]


class TiledEMAttention:
    r""":func:`em_attention` where only one tile of the positions is in memory.

    The sums of the M-step add up over positions. So each stage is one pass over the tiles
    (:meth:`add` each, then :meth:`step`), and a last pass reconstructs them (:meth:`attend` each). The tiles
    may come from anywhere, in any order, of any sizes and devices, as long as each pass brings every
    position once. The result equals ``em_attention`` of the tiles put together; nothing is differentiated.

    What is kept between tiles are the bases and the sums, C'×K and C×K numbers in float64 on the CPU:
    :meth:`state_dict` has all of them, so a run that was stopped can go on from the tile it had come to.

    Args:
        mu: the bases to start from, (C', K), (1, C', K) or (B, C', K).
        scale: as in :func:`em_attention`.
        weight: (C', C), as in :func:`em_attention`.
        bias: (C',), as in :func:`em_attention`.

    Raises:
        TypeError, ValueError: as :func:`em_attention`.

    Example:
        >>> tiles = torch.randn(1, 16, 1000).split(100, dim=2)
        >>> em = TiledEMAttention(torch.nn.functional.normalize(torch.randn(16, 4), dim=0))
        >>> for stage in range(3):
        ...     for tile in tiles:
        ...         em.add(tile)
        ...     em.step()
        >>> [em.attend(tile).out.shape for tile in tiles][:2]
        [torch.Size([1, 16, 100]), torch.Size([1, 16, 100])]
    """

    def __init__(
        self, mu: Tensor, *, scale: float = 1.0, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> None:
        check_tensor("mu", mu)
        if weight is not None:
            check_tensor("weight", weight)
        if mu.dim() not in (2, 3):
            raise ValueError(f"mu must be (C', K), (1, C', K) or (B, C', K); got {tuple(mu.shape)}")
        channels = mu.shape[-2:-1] if weight is None else weight.shape[-1:]
        nothing = torch.empty(mu.shape[:-2].numel(), *channels, 0, device=mu.device)
        check_arguments(nothing, mu, 1, scale, "none", None, weight, bias)
        self._dtype = mu.dtype
        self._scale = scale
        self._weight = None if weight is None else weight.detach().clone()
        self._bias = None if bias is None else bias.detach().clone()
        self._mu = _copy(mu if mu.dim() == 3 else mu[None])
        self._mu_before: Tensor | None = None  # the bases that the last stage started from
        self._sums: Tensor | None = None  # Σ x z above Σ z, (B, C + 1, K), over the stage's tiles so far

    @property
    def mu(self) -> Tensor:
        """The bases after the stages so far, (B, C', K)."""
        return self._mu.to(self._dtype, copy=True)

    @torch.no_grad()
    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        r"""Adds a tile's part to the sums of the stage: x (B, C, \*spatial), mask (B, \*spatial).

        Raises:
            ValueError: for a tile that is not finite, besides what :func:`em_attention` raises.
        """
        check_tensor("x", x)
        with without_autocast(x.device):
            problem, mu = self._prepare(x, self._mu, mask)
            sums = statistics(problem, expectation(problem, mu)).cpu().double()
        if not sums.isfinite().all():
            raise ValueError(
                "x must be finite where it takes part, and so must mu, weight and bias; one of them is not"
            )
        self._sums = sums if self._sums is None else self._sums + sums

    @torch.no_grad()
    def step(self) -> None:
        """Ends a stage: new bases from the sums of its tiles.

        Raises:
            ValueError: if no tile was added.
        """
        if self._sums is None:
            raise ValueError("step needs the tiles of a stage; got none since the last step")
        weight, bias = (None if p is None else p.cpu() for p in (self._weight, self._bias))
        # Of the problem maximization takes the projection, in the dtype of the sums that stand for x here.
        problem, _ = prepare(self._sums, self._mu, self._scale, None, weight, bias)
        with without_autocast(self._mu.device):
            self._mu_before, self._mu = self._mu, maximization(problem, self._sums.clone(), self._mu)
        self._sums = None

    @torch.no_grad()
    def attend(self, x: Tensor, mask: Tensor | None = None) -> EMAttention:
        r"""The tile's part of the result, ``(out, mu, z)`` as :func:`em_attention` gives it.

        Raises:
            ValueError: before the first stage has ended.
        """
        check_tensor("x", x)
        if self._mu_before is None:
            raise ValueError("attend needs a stage to have ended; got no step yet")
        with without_autocast(x.device):
            problem, mu = self._prepare(x, self._mu_before, mask)
            z = expectation(problem, mu)
        features, layout = flatten(x)
        return reconstruction(features, layout, self._mu.to(z), z)._replace(mu=self.mu)

    def state_dict(self) -> dict[str, Tensor | None]:
        """The state between two calls, for ``torch.save``."""
        return {"mu": self._mu, "mu_before": self._mu_before, "sums": self._sums}

    def load_state_dict(self, state_dict: dict[str, Tensor | None]) -> None:
        """Goes on from a :meth:`state_dict`.

        Raises:
            TypeError: for what is no dict of tensors.
            ValueError: for one of other tensors or shapes, or with values that are not finite.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dict; got {type(state_dict).__name__}")
        tensors = {name: tensor for name, tensor in state_dict.items() if tensor is not None}
        for name, tensor in tensors.items():
            check_tensor(name, tensor)
            check_dtype(name, tensor.dtype)
        bases = tuple(self._mu.shape[1:])
        expected = {"mu": bases, "mu_before": bases, "sums": (self._channels + 1, bases[1])}
        got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        fits = state_dict.keys() == expected.keys() and all(shape[1:] == expected[name] for name, shape in got.items())
        batches = {shape[:1] for shape in got.values()} - {(1,)}
        if not fits or "mu" not in got or len(batches) > 1:
            raise ValueError(f"state_dict must hold tensors (B, *) of {expected}, with one B; got {got}")
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"state_dict must hold finite tensors; {name} is not")
        copies = {name: _copy(tensor) for name, tensor in tensors.items()}
        self._mu, self._mu_before, self._sums = copies["mu"], copies.get("mu_before"), copies.get("sums")

    @property
    def _channels(self) -> int:
        """How many the tiles have."""
        return self._mu.shape[1] if self._weight is None else self._weight.shape[1]

    def _prepare(self, x: Tensor, mu: Tensor, mask: Tensor | None) -> tuple[Problem, Tensor]:
        """The tile's problem and the bases mu, both float32 or wider and on the tile's device."""
        if x.dim() > 2 and x.shape[1] != self._channels:
            raise ValueError(f"x must have {self._channels} channels; got {x.shape[1]}")
        has_begun = self._sums is not None or self._mu_before is not None
        seen = self._mu if self._sums is None else self._sums  # whose batch size is that of the tiles so far
        if x.dim() > 2 and len(x) != len(seen) and (has_begun or len(seen) > 1):
            before = "the tiles before it" if has_begun else "mu"
            raise ValueError(f"x must have the batch size of {before}, {len(seen)}; got {len(x)}")
        mu = mu.to(x.device, at_least_float32(self._dtype))
        weight, bias = (None if p is None else p.to(x.device) for p in (self._weight, self._bias))
        check_arguments(x, mu, 1, self._scale, "none", mask, weight, bias)
        features, _ = flatten(x)
        return prepare(features.to(at_least_float32(x.dtype, mu.dtype)), mu, self._scale, mask, weight, bias)


def _copy(tensor: Tensor) -> Tensor:
    """A copy in float64 on the CPU, which nobody else writes to."""
    return tensor.detach().to("cpu", torch.float64, copy=True)
