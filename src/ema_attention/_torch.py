"""PyTorch's modes; and its bugs that are worked around, each with the versions it was seen in and its test."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.func import vjp as _vjp

vjp: Any = _vjp  # its annotation demands an auxiliary output that is not asked for here


HAS_OUT_DTYPE = hasattr(torch.ops.aten.bmm, "dtype")
HAS_TOP_HOOKS = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")  # not in PyTorch 2.6

# Modes.


def is_tracing() -> bool:
    """Whether the code that runs is being recorded (torch.compile, torch.export, torch.jit.trace)."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def is_compiling() -> bool:
    """Whether torch.compile records the code, and not torch.export, which PyTorch 2.6 does not tell apart."""
    is_exporting = hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()
    return torch.compiler.is_compiling() and not is_exporting


def differentiates(*tensors: Tensor | None) -> bool:
    """Whether autograd, running eagerly, will want a gradient of one of these."""
    if not torch.is_grad_enabled() or is_tracing():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for the device; the meta device has none, and does not say so but raises."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(device.type, enabled=False) if autocasts(device) else contextlib.nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a convolution of x runs in: that of autocast, which leaves float64 alone, or x's own."""
    casts = autocasts(x.device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if casts else x.dtype


def at_least_float32(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype that these are promoted to, float32 at least; not by torch.promote_types, which is an operation."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def may_be_asked(tensor: Tensor) -> bool:
    """Whether code may depend on the values of ``tensor`` without waiting for a device or ending a trace."""
    return tensor.device.type == "cpu" and is_only_data(tensor) and not torch._C._len_torch_dispatch_stack()


def may_overwrite(tensor: Tensor) -> bool:
    """Whether an operation in place on a tensor of ours is seen by nobody: autograd, a trace or a transform."""
    return is_only_data(tensor) and not differentiates(tensor)


def is_only_data(tensor: Tensor) -> bool:
    """Whether a tensor is no stand-in: of a trace, of a subclass that runs operations itself, or under a transform.

    A subclass that only wraps functions is data. In a backward that starts at such a tensor it is a plain one.
    """
    is_traced = is_tracing() or is_transformed()
    return not is_traced and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers that can be looked at: no trace, no transform and no memory estimate runs."""
    return not (is_tracing() or is_transformed() or tensor.is_meta or isinstance(tensor, FakeTensor))


def is_transformed() -> bool:
    """Whether the code runs under a transform of torch.func, whatever tensors that maps over."""
    return not is_tracing() and torch._C._functorch.peek_interpreter_stack() is not None


def is_vmapped() -> bool:
    """Whether the code runs under torch.vmap, whose tensors mean nothing outside of it."""
    stack = None if is_tracing() else torch._C._functorch.get_interpreter_stack()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in stack or ())


def is_forward_mode() -> bool:
    """Whether derivatives are taken forward (torch.func.jvp, jacfwd), which the autograd.Functions here have not."""
    return forward_ad._current_level >= 0


@functools.cache
def has_amx() -> bool:
    """Whether the CPU has matrix registers (AMX), as an Intel Xeon since 2023."""
    return bool(torch.cpu._is_amx_tile_supported())


def multiplies_to_float32(*operands: Tensor) -> bool:
    """Whether torch.bmm of half-precision operands can give its float32 accumulators: it has no derivative.

    PyTorch 2.8 and newer, CUDA. Its baddbmm fails under compile (pytorch/pytorch#163880).
    """
    a = operands[0]
    can = HAS_OUT_DTYPE and a.device.type == "cuda" and a.dtype in (torch.float16, torch.bfloat16)
    return can and not (is_tracing() or is_forward_mode() or differentiates(*operands))


def is_in_backward() -> bool:
    """Whether the code runs inside a backward, as a forward does that activation checkpointing runs again."""
    return not is_tracing() and torch._C._current_graph_task_id() != -1


def saved_tensors_hooks() -> list[tuple[Any, Any]]:
    """The pairs of hooks that take what a graph would save, the innermost first; empty if PyTorch is too old.

    PyTorch shows the innermost pair alone: each is taken off to see the next, and then all are put back.
    """
    if not HAS_TOP_HOOKS:
        return []
    hooks = torch._C._autograd
    may_put_back = hooks._saved_tensors_hooks_get_disabled_error_message() is None
    pairs: list[tuple[Any, Any]] = []
    try:
        while pair := hooks._top_saved_tensors_default_hooks(True):
            pairs.append(pair)
            if not may_put_back:
                return pairs
            hooks._pop_saved_tensors_default_hooks()
    finally:
        if may_put_back:
            for pair in reversed(pairs):
                hooks._push_saved_tensors_default_hooks(*pair)
    return pairs


def pull_back(function: Any, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the inputs of ``function``, from that of its output.

    Not by torch.func.vjp where there are hooks for saved tensors, with which that does not work.
    """
    if not saved_tensors_hooks():
        gradients: tuple[Tensor, ...] = vjp(function, *inputs)[1](grad)
        return gradients
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, because one input may have been made from another: the gradient of that one must not pass through it.
        inputs = tuple(t[:] if create_graph and t.requires_grad else t.detach().requires_grad_() for t in inputs)
        output = function(*inputs)
    return torch.autograd.grad(output, inputs, grad, create_graph=create_graph, materialize_grads=True)


def is_distributed() -> bool:
    """Whether torch.distributed is initialised; not by is_initialized, which compiled code asks only once."""
    return dist.is_available() and dist.distributed_c10d._world.default_pg is not None


class _GiveZeroGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, *parameters: Tensor) -> Tensor:
        return y.clone()  # of a view, nothing may be changed in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return *grads, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def give_zero_gradient(y: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The tensor y, whose backward gives parameters that it does not depend on a gradient of 0.

    DistributedDataParallel stops where a trainable parameter gets none.
    """
    result: Tensor = _GiveZeroGradient.apply(y, *parameters)
    return result


# Modules that are more than their class.

_Module = TypeVar("_Module", bound=nn.Module)


def is_plain(module: nn.Module, kind: type[_Module]) -> TypeGuard[_Module]:
    """Whether ``module`` is of just this class: no subclass, no hook, no forward of its own."""
    return type(module) is kind and not is_patched(module)


def is_patched(module: nn.Module) -> bool:
    """Whether ``module`` has hooks or a forward of its own. (Hooks on all modules, as counters set, do not count.)"""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    # PyTorch 2.6 cannot trace vars() of a module.
    return any(hooks) or (not is_tracing() and not vars(module).keys().isdisjoint(("forward", "_conv_forward")))


def has_global_hooks() -> bool:
    """Whether hooks on all modules see what a module returns, or its gradient, as profilers and explainers do."""
    hooks = nn.modules.module
    return bool(hooks._global_forward_hooks or hooks._global_backward_hooks or hooks._global_backward_pre_hooks)


def call_as_leaf(module: nn.Module, x: fx.Proxy, *others: object) -> Any:
    """The call of ``module`` as one node of the graph that torch.fx traces, which is what it makes of torch's own.

    Inside a module that computes by sizes and settings there is nothing that it can trace.
    """
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(module), (x, *others), {})  # type: ignore[attr-defined]


# Bugs.


@torch.library.custom_op("ema_attention::snapshot", mutates_args=(), schema="(Tensor x) -> Tensor")
def snapshot(x: Tensor) -> Tensor:
    """A copy of a buffer that compiled code moves afterwards.

    The backward that torch.compile makes may copy the buffer itself again, which the forward has moved by then:
    pytorch/pytorch#197039, PyTorch 2.6 to 2.15; test_trains_through_the_partitioned_graph_of_ahead_of_time_autograd.
    What an operation of our own gave is kept for it.
    """
    return x.clone()


@snapshot.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def mend_gradient_of_one_sample(y: Tensor) -> None:
    """Gives the gradient of y (B, C, H, W) its batch stride, when it comes; see :func:`mend_batch_stride`."""
    if not is_tracing() and y.requires_grad and len(y) == 1:
        y.register_hook(lambda grad: grad if grad is None else mend_batch_stride(grad))  # None of a constant Function


def mend_batch_stride(y: Tensor) -> Tensor:
    """View of y (B, C, H, W) that has the batch stride of its layout, where the batch is one.

    A batch of one may have any, and BatchNorm2d's gradient is wrong on a CPU for some (PyTorch 2.14 and 2.15;
    test_unit_equals_its_formula and test_gradients_of_a_batch_of_one_in_any_memory_format).
    """
    if is_tracing() or len(y) != 1:
        return y
    is_channels_last = y.stride(1) < y.stride(3)
    return y[0].movedim(0, -1)[None].movedim(-1, 1) if is_channels_last else y[0][None]
