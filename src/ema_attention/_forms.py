"""Which form of a computation runs: the plain one, or one that saves time or memory. All give the same result.

=========================== ===================================== ==============================================
predicate                   plain form                            what the other one saves
=========================== ===================================== ==============================================
``folds_projection``        ``conv1`` is run                      the N×C projection and its N·C² products
``has_one_product``         autograd through ``_steps.run``       2T - 1 of the N×C gradients of x that are summed
``recomputes_activation``   autograd through ``conv2``            an N×C activation from forward to backward
``folds_norm``              ``conv2`` is run                      every N×C tensor but the output
=========================== ===================================== ==============================================

While a graph is traced (torch.compile, export) all forms but that of the projection are plain: compilers fuse them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

from ema_attention._torch import autocasts, differentiates, is_patched, is_plain, is_tracing

_is_plain_form: ContextVar[bool] = ContextVar("plain_form", default=False)


@contextmanager
def plain_form() -> Iterator[None]:
    """Everything inside runs in its plain form: the paper's operations, one by one, and nothing but autograd.

    The results are the same but for rounding. For whoever doubts that, or wants to read a profile or a traceback.

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


def _may_choose() -> bool:
    return not is_tracing() and not _is_plain_form.get()


def folds_projection(conv1: nn.Module) -> bool:
    """Whether EM takes conv1's weights into its bases, instead of conv1's output."""
    if type(conv1).forward is not nn.Conv2d.forward or is_patched(conv1):
        return False  # what it does is known to itself alone
    return is_tracing() or _may_choose()


def has_one_product(*tensors: Tensor | None) -> bool:
    """Whether EM on what autograd differentiates gathers the gradient of x in one product."""
    return _may_choose() and differentiates(*tensors)


def recomputes_activation(conv2: nn.Module, x: Tensor) -> bool:
    """Whether conv2 on x (B, C, N) is the 1×1 convolution and norm it was made of, to be run without its input."""
    if not _may_choose() or autocasts(x.device) or not (is_plain(conv2, nn.Sequential) and len(conv2) == 2):
        return False
    conv = conv2[0]
    return (
        is_plain(conv, nn.Conv2d)
        and conv.bias is None
        and conv.kernel_size == (1, 1)
        and conv.groups == 1
        and all(t.dtype == x.dtype for t in (*conv2.parameters(), *conv2.buffers()) if t.is_floating_point())
    )


def folds_norm(conv2: nn.Module, x: Tensor, mu: Tensor, z: Tensor) -> bool:
    """Whether conv2's norm is an affine map of each channel, known beforehand, and nothing is differentiated."""
    if not recomputes_activation(conv2, x) or differentiates(x, mu, z, *conv2.parameters()):
        return False
    assert isinstance(conv2, nn.Sequential)  # for the type checker, which does not see through the line above
    norm = conv2[1]
    kind = nn.SyncBatchNorm if type(norm) is nn.SyncBatchNorm else nn.BatchNorm2d
    if not is_plain(norm, kind) or norm.training:
        return False
    return all(t is not None for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
