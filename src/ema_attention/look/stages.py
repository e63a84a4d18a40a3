"""EM stage by stage: the maps and the objective on the way to what :func:`em_attention` returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ema_attention._checks import check_arguments, check_settings
from ema_attention._forms import plain_form
from ema_attention._layout import Layout, flatten
from ema_attention._steps import Problem, expectation, logits, maximization, prepare, run, statistics
from ema_attention._torch import without_autocast
from ema_attention.modules import EMAUnit

__all__ = ["EMStages", "em_stages", "model_stages"]

_Run: TypeAlias = tuple[Problem, Tensor, int, Layout]
"""What EM is run on: the problem, the bases to start from, the number of stages, the layout of the maps."""


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
    return _watch(*prepare(features, mu, scale, mask, weight, bias), stages, layout)


@torch.no_grad()
def em_stages_together(
    batches: Sequence[Tensor], mu: Tensor, stages: int, together: int, scale: float
) -> list[EMStages]:
    """The stages of each batch, from bases mu after ``together`` stages over the positions of all samples."""
    check_settings(stages, scale, "none")
    if sum(map(len, batches)) == 1:  # of a sample alone these are stages like the others
        stages, together = stages + together, 0
    runs = []
    for x in batches:
        check_arguments(x, mu, stages, scale, "none", None, None, None)
        features, layout = flatten(x)
        runs.append((*prepare(features, mu, scale, None, None, None), stages, layout))
    return _watch_together(runs, together)


def _watch_together(runs: Sequence[_Run], together: int) -> list[EMStages]:
    """Watches each run, from the bases of the first after ``together`` stages over the positions of all samples."""
    problems, mu = [problem for problem, *_ in runs], runs[0][1]
    with without_autocast(mu.device):
        for _ in range(together):
            sums = [statistics(problem, expectation(problem, mu)).sum(0, keepdim=True) for problem in problems]
            mu = maximization(problems[0], torch.stack(sums).sum(0), mu)
    return [_watch(problem, mu, stages, layout) for problem, _, stages, layout in runs]


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
    _see_units(model, x, lambda name, *seen: stages.__setitem__(name, _watch(*seen)))
    return stages


@torch.no_grad()
def model_stages_together(model: nn.Module, batches: Sequence[Any], together: int) -> list[dict[str, EMStages]]:
    """Of each batch what :func:`model_stages` returns, but from bases that all samples have in common.

    They are a unit's own bases after ``together`` stages over the positions of all samples.
    """
    seen: list[dict[str, _Run]] = []
    for x in batches:
        runs: dict[str, _Run] = {}

        def keep(name: str, problem: Problem, *others: Any, runs: dict[str, _Run] = runs) -> None:
            problem = problem._replace(x=problem.x.clone())  # conv1 may return x, and the model go on in place
            runs[name] = (problem, *others)

        _see_units(model, x, keep)
        seen.append(runs)
    stages: list[dict[str, EMStages]] = [{} for _ in seen]
    for name in dict.fromkeys(name for runs in seen for name in runs):
        ran = [i for i, runs in enumerate(seen) if name in runs]
        for i, watched in zip(ran, _watch_together([seen[i][name] for i in ran], together), strict=True):
            stages[i][name] = watched
    return stages


def _see_units(model: nn.Module, x: Any, see: Callable[..., None]) -> None:
    """Runs the model, and calls ``see(name, *run)`` for each unit as it runs."""
    has_run = False

    def hook(name: str, unit: EMAUnit, args: tuple[Any, ...], kwargs: dict[str, Any], _: Tensor) -> None:
        nonlocal has_run
        has_run = True
        see(name, *_unit_run(unit, *args, **kwargs))

    handles = [
        module.register_forward_hook(partial(hook, name), with_kwargs=True)
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
    if not has_run:
        raise ValueError(f"an EMAUnit of the model must run; got a {type(model).__name__} in which none does")


def _unit_run(unit: EMAUnit, x: Tensor, mask: Tensor | None = None) -> _Run:
    features, layout = flatten(x, unit.channel_dim)
    with plain_form():  # in conv1's space, whatever the size: the sums of several images are added
        return (*unit._prepare(features, layout, mask, unit.mu), unit.stages, layout)
