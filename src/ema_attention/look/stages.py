"""EM stage by stage: the maps and the objective on the way to what :func:`em_attention` returns."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ema_attention._checks import check_arguments
from ema_attention._layout import Layout, flatten
from ema_attention._steps import Problem, logits, prepare, run
from ema_attention._torch import without_autocast
from ema_attention.modules import EMAUnit

__all__ = ["EMStages", "em_stages", "model_stages"]


class EMStages(NamedTuple):
    """What :func:`em_stages` returns."""

    z: Tensor
    """(T, B, K, *spatial): the attention maps of each stage; the last are those of :func:`em_attention`."""
    objective: Tensor
    """(T + 1, B): EM's objective for the bases at the start and after each stage; but for rounding, it never falls."""


@torch.no_grad()
def em_stages(
    x: Tensor,
    mu: Tensor,
    stages: int,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> EMStages:
    """Every stage of :func:`em_attention`, to look at; no gradient passes.

    The objective of EM for bases mu, over the positions n of a sample that take part::

        J(mu) = Σ_n log Σ_k exp(scale · y_nᵀ mu_k)

    The arguments are those of :func:`em_attention`; y is x, or weight · x + bias.

    Returns:
        ``(z, objective)``: z (T, B, K, *spatial) and objective (T + 1, B) for T stages, float32 or wider.
        ``z[t]`` comes from the bases whose objective is ``objective[t]``; those it makes have ``objective[t + 1]``.

    Raises:
        TypeError, ValueError: as :func:`em_attention`.

    Example:
        >>> mu = torch.nn.functional.normalize(torch.randn(16, 4), dim=0)
        >>> z, objective = em_stages(torch.randn(2, 16, 8, 8), mu, 3)
        >>> z.shape, objective.shape
        (torch.Size([3, 2, 4, 8, 8]), torch.Size([4, 2]))
    """
    check_arguments(x, mu, stages, scale, "none", mask, weight, bias)
    features, layout = flatten(x)
    problem, start = prepare(features, mu, scale, mask, weight, bias)
    return _watch(problem, start, stages, layout)


def _watch(problem: Problem, mu: Tensor, stages: int, layout: Layout) -> EMStages:
    """Every stage from the bases mu, float32 or wider."""
    problem = problem._replace(x=problem.x.to(mu.dtype))

    def objective(mu: Tensor) -> Tensor:
        explained = logits(problem, mu).logsumexp(-1, keepdim=True)
        return (explained if problem.absent is None else explained.masked_fill(problem.absent, 0.0)).sum((1, 2))

    with without_autocast(problem.x.device):
        seen = list(run(problem, mu, stages))
        objectives = [objective(mu), *(objective(stage.mu) for stage in seen)]
    return EMStages(torch.stack([layout.restore_maps(stage.z.mT) for stage in seen]), torch.stack(objectives))


@torch.no_grad()
def model_stages(model: nn.Module, x: Tensor) -> dict[str, EMStages]:
    r"""Runs ``model`` on x, in eval mode, and returns every EM stage of every :class:`EMAUnit` in it.

    The keys are the units' names in ``model.named_modules()``, in the order in which they ran; of a unit that
    runs more than once it is the latest call. The last maps of a unit are those that
    :func:`collect_attention_maps` collects. What torch.compile has compiled is run as it was before. The modes
    of the modules are put back.

    Args:
        model: a model with one unit or more.
        x: what it takes, (B, ...).

    Raises:
        ValueError: if no ``EMAUnit`` of the model runs.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), EMAUnit(8, num_bases=4))
        >>> {name: tuple(z.shape) for name, (z, _) in model_stages(model, torch.randn(2, 3, 10, 10)).items()}
        {'1': (3, 2, 4, 8, 8)}
    """
    stages: dict[str, EMStages] = {}

    def keep(name: str, unit: EMAUnit, args: tuple[Any, ...], kwargs: dict[str, Any], _: Tensor) -> None:
        stages[name] = _unit_stages(unit, *args, **kwargs)

    handles = [
        module.register_forward_hook(partial(keep, name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, EMAUnit)
    ]
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.compiler.set_stance("force_eager"):  # compiled code may not look for hooks
            model(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    if not stages:
        raise ValueError(f"an EMAUnit of the model must run; got a {type(model).__name__} in which none does")
    return stages


def _unit_stages(unit: EMAUnit, x: Tensor, mask: Tensor | None = None) -> EMStages:
    features, layout = flatten(x, unit.channel_dim)
    return _watch(*unit._prepare(features, layout, mask, unit.mu), unit.stages, layout)
