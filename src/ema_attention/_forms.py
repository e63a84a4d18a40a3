"""Which form of a computation runs: the plain one, or one that saves time or memory. All give the same result.

=========================== ============================ ==================================================
chosen by                   plain form                   what another form saves
=========================== ============================ ==================================================
``projection_form``         ``conv1`` is called          folded: the N×C projection and its N·C² products;
                                                         multiplied: time, where a product is faster
``has_one_product``         autograd through ``run``     2T - 1 of the N×C gradients of x that are summed
``residual_form``           ``conv2`` is called          folded: every N×C tensor but the output;
                                                         recomputed: an N×C activation held for backward;
                                                         multiplied: time, where a product is faster
``has_half_products``       products in float32          half precision is faster, and as good as it can be
=========================== ============================ ==================================================

While a graph is traced (torch.compile, export) a form cannot depend on a size, and compilers fuse the plain form. But
conv1 is folded there, except on CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn

from ema_attention._torch import (
    autocasts,
    differentiates,
    has_amx,
    has_global_hooks,
    is_forward_mode,
    is_plain,
    is_tracing,
    multiplies_to_float32,
)

HALF = (torch.bfloat16, torch.float16)

# From 2TK positions on folding takes fewer multiply-accumulates; it begins at this many times as many. The first number
# is measured with two threads of an AMD EPYC, where a convolution does twice as much a second as a product. The second
# with two of an Intel Xeon: the convolution gains from half precision, and the folded products do not, which are
# float32.
FOLDS_FROM = 2.5
FOLDS_FROM_IN_HALF = 4.0
SAVES_MEMORY_FROM = 2048  # positions; below, what is saved is less than what it costs to save it

_is_plain_form: ContextVar[bool] = ContextVar("plain_form", default=False)


@contextmanager
def plain_form() -> Iterator[None]:
    """Everything inside runs in its plain form: the paper's operations, one by one, and nothing but autograd.

    The results are the same but for rounding. (A ``weight`` that is given to :func:`em_attention` stays folded.) For
    whoever doubts that, or wants to read a profile or a traceback. Code that torch.compile, torch.export or
    torch.jit.trace records is not changed by it. A backward that runs a checkpoint again needs it too.

    Example:
        >>> import torch
        >>> from ema_attention import EMAUnit
        >>> unit, x = EMAUnit(8, num_bases=4).eval(), torch.randn(2, 8, 6, 6)
        >>> with plain_form():
        ...     y = unit(x)
        >>> torch.allclose(y, unit(x), atol=1e-6)
        True
    """
    token = _is_plain_form.set(True)
    try:
        yield
    finally:
        _is_plain_form.reset(token)


def projection_form(
    conv1: nn.Module, x: Tensor, num_bases: int, stages: int
) -> Literal["folded", "multiplied", "called"]:
    """How EM gets conv1(x) of x (B, C, N): with conv1 folded into the bases, as a product, or by calling conv1.

    Folding takes 2TK·C·C' multiply-accumulates a sample, calling N·C·C'. But CUDA convolves on tensor cores, in half
    precision and by default in float32 (TF32). The float32 products with the bases gain from neither. So conv1 is
    called there, which is not measured.
    """
    if not is_pointwise(conv1):
        return "called"
    if not _may_choose():
        return "folded" if is_tracing() and x.device.type != "cuda" else "called"
    folds_from = FOLDS_FROM_IN_HALF if x.dtype in HALF else FOLDS_FROM
    is_large = x.device.type != "cuda" and x.shape[2] > folds_from * 2 * stages * num_bases
    if is_large:
        return "folded"
    return "multiplied" if multiplies_faster(x) else "called"


def has_one_product(x: Tensor, mu: Tensor, projection: Tensor | None) -> bool:
    """Whether backward computes the gradient of x (B, C, N) in one product."""
    return differentiates(x, mu, projection) and _may_choose() and x.shape[2] >= SAVES_MEMORY_FROM


def multiplies_faster(x: Tensor) -> bool:
    """Whether a 1×1 convolution of x runs as a matrix product.

    On an Intel Xeon that has AMX it takes less time, least of all in half precision. On an AMD EPYC it takes longer.
    """
    return x.device.type == "cpu" and _may_choose() and has_amx()


def residual_form(
    conv2: nn.Sequential, x: Tensor, mu: Tensor, z: Tensor
) -> Literal["folded", "recomputed", "multiplied", "called"]:
    """How conv2 runs on relu(mu zᵀ), for x (B, C, N).

    Folded: with the norm in the convolution's weights, in blocks of positions, where that norm is an affine map of each
    channel, known beforehand, and nothing is differentiated. Recomputed: backward computes conv2's input again.
    Multiplied: conv2's convolution is a product. Called: as any other module.
    """
    is_small = x.shape[2] < SAVES_MEMORY_FROM
    if not _may_choose() or (is_small and not multiplies_faster(x)) or not _is_convolution_and_norm(conv2, x):
        return "called"
    if is_small:
        return "multiplied"
    conv: Any
    norm: Any
    conv, norm = conv2
    if is_batch_norm(norm) and not norm.training:
        parts = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        if all(part is not None for part in parts) and not differentiates(x, mu, z, conv.weight, *parts[:2]):
            return "folded"
    return "recomputed"


def sees_single_positions(conv2: nn.Sequential) -> bool:
    """Whether conv2 is as it was made, so that positions may lie in one row: that is convolved faster than an image."""
    return is_plain(conv2, nn.Sequential) and len(conv2) == 2 and is_pointwise(conv2[0]) and is_batch_norm(conv2[1])


def adds_in_place(conv2: nn.Sequential) -> bool:
    """Whether x is added to conv2's output in place: no hook and no backward looks at its BatchNorm's output."""
    if has_global_hooks() or not _may_choose() or not is_plain(conv2, nn.Sequential):
        return False
    return len(conv2) > 0 and is_plain(conv2[-1], nn.BatchNorm2d)


def has_half_products(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the products of x with bases and maps of ``dtype`` run in x's own dtype, half precision.

    That is what half precision is fast at. But a sum over positions leaves the range of float16, unless the device
    gives the float32 that it is accumulated in.
    """
    if x.dtype not in HALF or dtype != torch.float32:
        return False
    if not (is_tracing() or _may_choose()):
        return False
    return x.dtype == torch.bfloat16 or multiplies_to_float32(x)


def _may_choose() -> bool:
    return not (is_tracing() or is_forward_mode() or _is_plain_form.get())


def _is_convolution_and_norm(conv2: nn.Module, x: Tensor) -> bool:
    """Whether conv2 is a 1×1 convolution without bias and one more module, with weights in x's dtype or autocast's."""
    if not (is_plain(conv2, nn.Sequential) and len(conv2) == 2):
        return False
    conv, norm = conv2
    if not is_pointwise(conv) or conv.bias is not None:
        return False
    return autocasts(x.device) or all(
        p is None or p.dtype == x.dtype for p in (conv.weight, norm._parameters.get("weight"))
    )


def is_batch_norm(norm: nn.Module) -> bool:
    """Whether ``norm`` is just BatchNorm2d or SyncBatchNorm."""
    return is_plain(norm, nn.SyncBatchNorm if type(norm) is nn.SyncBatchNorm else nn.BatchNorm2d)


def is_pointwise(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether calling ``conv`` would run a 1×1 convolution and nothing else."""
    return (
        is_plain(conv, nn.Conv2d)
        and conv.kernel_size == (1, 1)
        and conv.stride == (1, 1)
        and conv.padding in ((0, 0), "same", "valid")
        and conv.groups == 1
    )
