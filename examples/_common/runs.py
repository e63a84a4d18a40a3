"""The bookkeeping of a training: checkpoints, evaluations, and what TensorBoard shows."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ema_attention import EMAUnit
from examples._common.evaluation import evaluate, mean_iou
from examples._common.files import first_not_finite, load_checkpoint, remove_parts, save_checkpoint
from examples._common.locks import held
from examples._common.pictures import plot_segmentation
from examples._common.processes import failing_together, rank_and_ranks, share_buffers
from examples._common.recipe import Learner, Recipe
from examples._common.samples import Samples

SCALARS_EVERY = 10  # steps: reading a loss waits for the device


class Run:
    """A run in a folder: ``last.pt`` to go on from, ``best.pt``, and TensorBoard's events.

    Of several processes the first one writes.

    Args:
        folder: of the run.
        learner: what is trained. Its states are in the checkpoints.
        recipe: how it is trained.
        val_set: decides which weights are the best ones.
        facts: what checkpoints also tell of the run. A run goes on only from one with the same.
    """

    def __init__(self, folder: Path, learner: Learner, recipe: Recipe, val_set: Samples, facts: dict[str, Any]) -> None:
        self.folder = folder
        self.learner = learner
        self.recipe = recipe
        self.val_set = val_set
        self.facts = {"recipe": asdict(recipe), **facts}
        self.rank, self.ranks = rank_and_ranks()
        self.last, self.best = folder / "last.pt", folder / "best.pt"
        self.is_in_place: Callable[[], bool] = lambda: False
        """Whether the folder is there, and no other run's; the first process asks."""
        self.writer: SummaryWriter | None = None
        self.bar: tqdm | None = None
        self.step = 0
        self.history: dict[int, list[float]] = {}
        """The IoU of every class at each evaluation, by step."""

    @contextmanager
    def begun(self, resume: bool) -> Iterator[None]:
        """Goes on from ``last.pt``, if it is there, and keeps other runs out of the folder while the context is open.

        Raises:
            ValueError: if another process has a run in the folder; if ``last.pt`` is there and ``resume`` is not
                given, or if it is of another network, recipe or data set; if the processes are at different steps.
        """
        with ExitStack() as stack:
            with failing_together():
                if self.rank == 0:
                    lock = held(self.folder / ".lock", f"a run in {self.folder}")
                    self.is_in_place = stack.enter_context(lock)
                    remove_parts(self.last, self.best)
                if self.last.exists():
                    if not resume:
                        raise ValueError(
                            f"{self.folder} holds a run already: go on with --resume, or choose another folder"
                        )
                    self._restore()
            if self.ranks > 1:
                steps = [self.step] * self.ranks
                dist.all_gather_object(steps, self.step)
                if len(set(steps)) > 1:
                    raise ValueError(
                        f"{self.last} must be in a folder that all processes share; they are at the steps {steps}"
                    )
            yield

    def _restore(self) -> None:
        checkpoint = load_checkpoint(self.last)
        states = self.learner._asdict()
        if not self.facts.keys() | states.keys() | {"step", "history"} <= checkpoint.keys():
            raise ValueError(f"{self.last} must be a run's last checkpoint; it has only {', '.join(checkpoint)}")
        theirs = _settings(checkpoint)
        for name, value in _settings(self.facts).items():
            if name != "workers" and theirs.get(name) != value:
                raise ValueError(f"{self.last} is of a run with {name} = {theirs.get(name)}; got {name} = {value}")
        for name, value in self.facts["modules"].items():
            other = checkpoint["modules"].get(name, value)  # a newer library may have more attributes
            if other != value:
                raise ValueError(f"{self.last} is of a network with {name} = {other}; got {name} = {value}")
        if name := first_not_finite(checkpoint["model"]):
            raise ValueError(f"{self.last} must hold a network of finite numbers; {name} has others")
        for name, part in states.items():
            try:
                part.load_state_dict(checkpoint[name])
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"{self.last} does not fit the {name}: {shorten(str(error), 200)}") from error
        self.step, self.history = checkpoint["step"], checkpoint["history"]

    @contextmanager
    def shown(self, batches: Iterable[Any]) -> Iterator[Iterable[Any]]:
        """Yields the batches with a progress bar. TensorBoard's events are written while the context is open."""
        shape = {"total": self.recipe.steps, "initial": self.step, "unit": "step"}
        with self._events() as self.writer, tqdm(batches, "training", **shape, disable=self.rank > 0 or None) as bar:
            self.bar = bar
            yield bar

    def is_due(self) -> bool:
        """Whether an evaluation belongs to this step."""
        return self.step > 0 and (self.step % self.recipe.evaluate_every == 0 or self.step == self.recipe.steps)

    def note(self, loss: Tensor) -> None:
        """Counts a step, and shows its loss and the learning rate now and then.

        Raises:
            ValueError: if the loss is shown and not finite.
        """
        self.step += 1
        if self.step % SCALARS_EVERY:
            return
        with failing_together():
            scalars = {"loss": loss.item(), "lr": self.learner.scheduler.get_last_lr()[0]}
            if not math.isfinite(scalars["loss"]):
                raise ValueError(f"the loss of step {self.step} is {scalars['loss']}: {self._advice()}")
            if self.writer:
                self.bar.set_postfix({name: f"{value:.3g}" for name, value in scalars.items()})
                with self._naming_events():
                    for name, value in scalars.items():
                        self.writer.add_scalar(name, value, self.step)

    def validate(self) -> None:
        """Evaluates the network, saves it as the best if no evaluation before was as good, and saves the run."""
        model = self.learner.model
        if self.ranks > 1:
            share_buffers(model)
        iou = evaluate(model, self.val_set, next(model.parameters()).device)
        self.history[self.step] = iou.tolist()
        *before, now = map(mean_iou, self.history.values())
        if math.isnan(now):
            raise ValueError("the images for validation must have labels of classes; they have none")
        if not before or now > max(before):
            self.save(self.best)
        self.save(self.last)  # after the best: a run that dies in between evaluates again
        with failing_together():
            if self.writer:
                self.bar.write(f"step {self.step}: mIoU {100 * now:.2f}")
                with self._naming_events():
                    show_evaluation(self.writer, model, self.val_set, iou, self.step)

    def save(self, path: Path) -> None:
        """Writes a checkpoint.

        Raises:
            ValueError: if a number of the network is not finite, or the file cannot be written.
        """
        with failing_together():
            if self.rank > 0:
                return
            if name := first_not_finite(self.learner.model.state_dict()):
                raise ValueError(f"{name} is not finite at step {self.step}: {self._advice()}")
            if not self.is_in_place():
                raise ValueError(f"cannot write {path}: its folder, or the .lock in it, was removed during the run")
            states = {name: part.state_dict() for name, part in self.learner._asdict().items()}
            save_checkpoint({"step": self.step, "history": self.history, **self.facts, **states}, path)

    def _advice(self) -> str:
        advice = f"try a smaller lr than {self.recipe.lr}"
        return f"{advice}, or bfloat16" if self.recipe.precision == "float16" else advice

    @contextmanager
    def _events(self) -> Iterator[SummaryWriter | None]:
        if self.rank > 0:
            yield None
            return
        hook = threading.excepthook

        def leave_file_errors(failure: threading.ExceptHookArgs) -> None:
            """Says nothing of what TensorBoard's thread could not write: the next call of the writer raises it too."""
            if not isinstance(failure.exc_value, OSError):
                hook(failure)

        threading.excepthook = leave_file_errors
        try:
            with self._naming_events():
                writer = SummaryWriter(self.folder, purge_step=self.step + 1)
            try:
                yield writer
            finally:
                with self._naming_events():
                    writer.close()
        finally:
            threading.excepthook = hook

    @contextmanager
    def _naming_events(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"cannot write TensorBoard's events in {self.folder}: {error.strerror or error}"
            ) from error


def describe_modules(model: nn.Module) -> dict[str, Any]:
    """The class of every module and its plain attributes, by name: what the shapes of weights do not tell.

    Private attributes are of a run: whether it compiles a module, for one.
    """
    facts: dict[str, Any] = {}
    for name, module in model.named_modules():
        facts[name or "network"] = type(module).__name__
        settings = {key: value for key, value in vars(module).items() if key != "training" and key[0] != "_"}
        if isinstance(module, EMAUnit):
            settings["gradient"] = module.gradient  # a property
        for attribute, value in settings.items():
            values = value if isinstance(value, tuple) else (value,)
            if all(type(value) in (bool, int, float, str) for value in values):
                facts[f"{name}.{attribute}".strip(".")] = value
    return facts


def _settings(facts: dict[str, Any]) -> dict[str, Any]:
    """What two runs must have in common, by name."""
    alike = {name: facts[name] for name in ("samples", "size", "transform", "names", "train_set", "val_set")}
    return {**facts["recipe"], **(facts["network"] or {}), **alike}


def show_evaluation(writer: SummaryWriter, model: nn.Module, val_set: Samples, iou: Tensor, step: int) -> None:
    """Shows the IoU in TensorBoard, and the first image with its label, prediction and attention maps."""
    writer.add_scalar("mIoU", mean_iou(iou), step)
    for name, value in zip(val_set.names, iou.tolist(), strict=True):
        writer.add_scalar(f"IoU/{name}", value, step)
    writer.add_figure("segmentation", plot_segmentation(model, *val_set[0], val_set.names, val_set.colours), step)
