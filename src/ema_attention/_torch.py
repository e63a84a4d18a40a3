"""PyTorch's modes; and its bugs that are worked around, each with the versions it was seen in and its test."""

from __future__ import annotations

import contextlib
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.func import vjp as _vjp
from torch.utils.module_tracker import ModuleTracker

vjp: Any = _vjp  # its annotation demands an auxiliary output that is not asked for here


# Modes.


def is_tracing() -> bool:
    """Whether the code that runs is being recorded (torch.compile, torch.export, torch.jit.trace)."""
    return torch.compiler.is_compiling() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def differentiates(*tensors: Tensor | None) -> bool:
    """Whether autograd, running eagerly, will want a gradient of one of these."""
    if is_tracing() or not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for the device; the meta device has none, and does not say so but raises."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(device.type, enabled=False) if autocasts(device) else contextlib.nullcontext()


def is_recomputing() -> bool:
    """Whether a forward runs inside a backward, as it does where activation checkpointing runs it again."""
    return not is_tracing() and ModuleTracker().is_bw


# Modules that are more than their class.

_Module = TypeVar("_Module", bound=nn.Module)


def is_plain(module: nn.Module, kind: type[_Module]) -> TypeGuard[_Module]:
    """Whether ``module`` is of just this class: no subclass, no hook, no forward of its own."""
    return type(module) is kind and not is_patched(module)


def is_patched(module: nn.Module) -> bool:
    """Whether ``module`` has hooks or a forward of its own. (Hooks on all modules, as counters set, do not count.)"""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    # PyTorch 2.6 cannot trace vars() of a module.
    return any(hooks) or (not is_tracing() and "forward" in vars(module))


# Bugs.


def assign_to_buffer(module: nn.Module, name: str, value: Tensor) -> None:
    """Gives a buffer a new value: in place, but for compiled code.

    A compiled backward may read a buffer again that the forward has moved in place: pytorch/pytorch#197039, PyTorch
    2.6 to 2.15; test_trains_through_the_partitioned_graph_of_ahead_of_time_autograd.
    """
    if torch.compiler.is_compiling():
        setattr(module, name, value)
    else:
        module.get_buffer(name).copy_(value)


def insert_row_dimension(x: Tensor) -> Tensor:
    """View of x (B, C, N) as (B, C, 1, N), for modules made for images.

    Not as (B, C, N, 1): from channels-last memory that makes a stride for which BatchNorm2d's gradient is wrong on a
    CPU (PyTorch 2.14 and 2.15; test_unit_equals_its_formula).
    """
    return x.unsqueeze(2)


def mend_gradient_of_one_sample(y: Tensor) -> None:
    """Gives the gradient of y (1, C, N) the batch stride that its layout has, when it comes.

    Views of a batch of one may have any, and BatchNorm2d's gradient is wrong on a CPU for some (PyTorch 2.14 and 2.15;
    test_gradients_of_a_batch_of_one_in_any_memory_format).
    """
    if not is_tracing() and y.requires_grad and len(y) == 1:
        y.register_hook(_with_batch_stride)


def _with_batch_stride(grad: Tensor) -> Tensor:
    is_channels_last = grad.stride(1) < grad.stride(2)
    return grad[0].mT[None].mT if is_channels_last else grad[0][None]
