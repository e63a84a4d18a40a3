"""The training of a segmentation network: one step, and the loop around it.

The recipe and its optimizer are in ``recipe.py``, checkpoints and TensorBoard in ``runs.py``, and the processes that
share a batch in ``processes.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from examples._common.processes import agree, rank_and_ranks, stop_on_signal
from examples._common.recipe import PRECISIONS, Learner, Recipe, make_learner
from examples._common.runs import Run, describe_modules
from examples._common.samples import IGNORE, Batches, Drawn, Samples, loaded, seed_everything


def training_step(learner: Learner, forward: nn.Module, image: Tensor, mask: Tensor, precision: str) -> Tensor:
    """One step on images (B, 3, H, W) and their classes (B, H, W).

    Args:
        learner: the model, and what changes it.
        forward: the model, or what runs it among several processes.
        image: normalised.
        mask: with ``IGNORE`` where there is no label.
        precision: one of ``PRECISIONS``.

    Returns:
        The loss before the step: the cross-entropy, its mean over the pixels that have a label.
    """
    with torch.autocast(image.device.type, PRECISIONS[precision], enabled=precision != "float32"):
        logits = forward(image)  # (B, classes, H, W)
    loss = F.cross_entropy(logits.float(), mask, ignore_index=IGNORE, reduction="sum")
    loss = loss / (mask != IGNORE).sum().clamp_min(1)  # a batch may have no label at all
    learner.optimizer.zero_grad()
    learner.scaler.scale(loss).backward()
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.scheduler.step()
    return loss


def fit(
    model: nn.Module,
    train_set: Samples,
    val_set: Samples,
    transform: v2.Transform,
    recipe: Recipe,
    folder: Path,
    device: torch.device | str = "cpu",
    resume: bool = False,
    network: dict[str, Any] | None = None,
) -> dict[int, list[float]]:
    """Trains ``model``, and returns the IoU of every class on ``val_set`` at each evaluation, by step.

    A step's samples, their augmentation and its dropout depend on the seed and on the step's number alone. So a run
    that was interrupted and resumed gives the same as one that was not. After Ctrl-C or SIGTERM it ends with the
    current step. With torch.distributed initialised the processes share each batch, and all hold the same weights
    and bases.

    Args:
        model: maps images (B, 3, H, W) to logits (B, classes, H, W).
        train_set: raw samples, to which ``transform`` is applied.
        val_set: raw samples. They decide which weights are the best ones.
        transform: from a raw sample to a normalised image and its mask, at random.
        recipe: how to train.
        folder: where ``last.pt``, ``best.pt`` and TensorBoard's events go.
        device: of the training.
        resume: go on from ``folder/last.pt``, if it is there.
        network: how the model is built, for who reads a checkpoint.

    Raises:
        ValueError: if the folder holds a run and ``resume`` is not given, or a run of another network, recipe, data
            set or image size; if another process trains in the folder, or it is gone; if processes resume from
            different steps; if the loss or a number of the network is not finite; if a file cannot be written.
    """
    rank, ranks = rank_and_ranks()
    device = torch.device(device)
    learner = make_learner(model, recipe, device)
    modules = describe_modules(model)  # whether one process trains it or many
    if ranks > 1 and device.type == "cuda":  # PyTorch has no SyncBatchNorm for the CPU
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # its parameters stay the optimizer's
        learner = learner._replace(model=model)
    facts = {
        "network": network,
        "modules": modules,
        "samples": len(train_set),
        "train_set": train_set.fingerprint(),
        "val_set": val_set.fingerprint(),
        "size": tuple(val_set[0][0].shape[-2:]),
        "transform": " ".join(str(transform).split()),
        "names": train_set.names,
        "colours": train_set.colours,
    }
    run = Run(folder, learner, recipe, val_set, facts)
    with run.begun(resume):
        forward = DistributedDataParallel(model) if ranks > 1 else model
        batches = Batches(len(train_set), recipe.batch, run.step, recipe.steps, recipe.seed, rank, ranks)
        loader = DataLoader(Drawn(train_set, transform, recipe.seed), batch_sampler=batches, num_workers=recipe.workers)
        with stop_on_signal() as is_stopped, run.shown(loaded(loader)) as shown:
            model.train()
            if run.is_due() and run.step not in run.history:
                run.validate()
            for image, mask in shown:
                seed_everything(recipe.seed, run.step, rank)
                image = image.to(device, memory_format=torch.channels_last)
                loss = training_step(learner, forward, image, mask.to(device), recipe.precision)
                stopped = agree(is_stopped(), device)
                run.note(loss)
                if stopped or run.is_due():
                    run.save(run.last)  # before the evaluation, which may outlast a process that has to stop
                if stopped:
                    break
                if run.is_due():
                    run.validate()
    return run.history
