"""What reaches the backbone while a network is trained: norms of gradients, noted at every step."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ema_attention import EMAUnit
from examples._common.files import written_whole

Notes = dict[str, list[float]]
"""Of one step. ``stages``: the norm of the gradient of the parameters of each stage of the backbone.

Of an EMAUnit also ``branch``: the norm of the gradient that reaches x through the attention, divided by that of the one
through the sum with x.
"""

EARLY = 64
"""The first steps are those before this one, a power of 2 as the windows of :func:`means_of` are."""


@contextmanager
def noted(backbone: Iterable[nn.Module], block: nn.Module, path: Path, step: int) -> Iterator[None]:
    """While the context is open, each step of an optimizer adds a line to a file.

    Args:
        backbone: its stages, which are in front of the block.
        block: of the network that is trained.
        path: of the file. Its lines after ``step`` are of steps that will be taken again, and go.
        step: how many have been taken already.

    Raises:
        ValueError: if the file has no line for each of these steps.
    """
    now: Notes = {}

    def note_branch(unit: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        (x,) = inputs
        if not x.requires_grad:
            return
        through_sum: list[Tensor] = []
        passes = y.detach() > 0  # the last ReLU. Not y itself: what a hook on y holds of y is never freed

        def note(grad: Tensor) -> None:
            (direct,) = through_sum
            now["branch"] = [((grad - direct).norm() / direct.norm().clamp_min(torch.finfo(grad.dtype).tiny)).item()]

        y.register_hook(lambda grad: through_sum.append(grad * passes))
        x.register_hook(note)

    def note_step(*_: object) -> None:
        now["stages"] = [
            get_total_norm([p.grad for p in stage.parameters() if p.grad is not None]).item() for stage in backbone
        ]
        file.write(json.dumps(now) + "\n")
        now.clear()

    before = path.read_bytes().splitlines(keepends=True)[:step] if path.exists() else []
    if len(before) < step:
        raise ValueError(
            f"{path} must have a line for each of the {step} steps that were taken; got {len(before)}: remove its "
            "folder, and the run begins anew"
        )
    with written_whole(path) as whole:
        whole.writelines(before)
    watched = block.register_forward_hook(note_branch) if isinstance(block, EMAUnit) else nullcontext()
    with path.open("a", buffering=1) as file, register_optimizer_step_pre_hook(note_step), watched:
        yield


def means_of(path: Path) -> dict[int, Notes]:
    """The means of what :func:`noted` has written over steps 1, 2 to 3, 4 to 7 and so on, by the first of each."""
    notes = [json.loads(line) for line in path.read_text().splitlines()]
    means = {}
    first = 1
    while first <= len(notes):
        part = notes[first - 1 : 2 * first - 1]
        columns = {name: torch.tensor([note[name] for note in part]).mean(0).tolist() for name in part[0]}
        means[first] = {name: [float(f"{value:.4g}") for value in values] for name, values in columns.items()}
        first *= 2
    return means


def early(notes: dict[str, Notes], name: str) -> list[float]:
    """The mean of what a row has noted under a name, over the first steps, from the means over 1, 2, 4, ... steps."""
    weights = {step: int(step) for step in notes if int(step) < EARLY}
    columns = zip(*([weight * value for value in notes[step][name]] for step, weight in weights.items()), strict=True)
    return [sum(column) / sum(weights.values()) for column in columns]
