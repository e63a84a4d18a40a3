"""How a network is trained: its recipe, and the optimizer that follows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import SGD
from torch.optim.lr_scheduler import PolynomialLR

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _setting(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the defaults are the published ones, for PASCAL VOC."""

    steps: int = _setting(30_000, "of the optimizer")
    batch: int = _setting(16, "samples of a step, over all processes")
    lr: float = _setting(9e-3, "learning rate at the start, which falls polynomially; biases have twice it")
    momentum: float = _setting(0.9, "of SGD")
    weight_decay: float = _setting(1e-4, "of the weights of convolutions; norms and biases have none")
    norm_momentum: float = _setting(3e-4, "of BatchNorm's running statistics: the weight of the new ones")
    precision: str = _setting("float32", "the others are by autocast")
    seed: int = _setting(0, "of the weights that are not loaded, of order, augmentation and dropout")
    evaluate_every: int = _setting(1_000, "steps between two evaluations, and between two checkpoints")
    workers: int = _setting(0, "processes that load data; 0 loads it in the training's own")

    def __post_init__(self) -> None:
        """Raises ValueError for numbers and precisions that make no sense."""
        for name in ("steps", "batch", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("lr", "momentum", "weight_decay", "norm_momentum", "seed", "workers"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0; got {getattr(self, name)}")
        if self.norm_momentum > 1:
            raise ValueError(f"norm_momentum must be at most 1; got {self.norm_momentum}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {tuple(PRECISIONS)}; got {self.precision!r}")


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The published groups: weight decay for the weights of convolutions alone, and biases at twice the rate."""
    decayed, plain, biases = [], [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if name == "bias":
                biases.append(parameter)
            elif isinstance(module, nn.Conv2d):
                decayed.append(parameter)
            else:
                plain.append(parameter)
    return [
        {"params": decayed, "lr": recipe.lr, "weight_decay": recipe.weight_decay},
        {"params": plain, "lr": recipe.lr, "weight_decay": 0.0},
        {"params": biases, "lr": 2 * recipe.lr, "weight_decay": 0.0},
    ]


class Learner(NamedTuple):
    """A model and what changes it. A run goes on from the states of all four."""

    model: nn.Module
    optimizer: SGD
    scheduler: PolynomialLR
    scaler: GradScaler
    """Of the loss, in float16; it does nothing in other precisions."""


def make_learner(model: nn.Module, recipe: Recipe, device: torch.device) -> Learner:
    """SGD with a learning rate that falls polynomially, for a model that is moved to the device."""
    model.to(device)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = recipe.norm_momentum
    optimizer = SGD(parameter_groups(model, recipe), momentum=recipe.momentum)
    scheduler = PolynomialLR(optimizer, recipe.steps, power=0.9)
    return Learner(model, optimizer, scheduler, GradScaler(device.type, enabled=recipe.precision == "float16"))
