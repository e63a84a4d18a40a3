"""What a forward asks of a device: how many operations, and in which dtypes; counted, nothing is timed."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from ema_attention import EMAUnit, _forms
from ema_attention._torch import HAS_TOP_HOOKS

AS_SHIPPED = _forms.SAVES_MEMORY_FROM  # before the tests run with another
VIEWS = {"view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "split", "detach", "alias"}
MEMORY = {"_unsafe_view", "empty"}


class Operations(TorchDispatchMode):
    """Counts operations by name, and keeps the dtypes and sizes of what each returns."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.results: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name not in VIEWS | MEMORY:
            self.counts[name] += 1
            if isinstance(result, Tensor):
                self.results.append((name, result.dtype, result.numel()))
        return result


@pytest.mark.parametrize(("training", "most"), [(False, 48), (True, 60)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_number_of_operations_of_a_forward_in_float32(
    training: bool, most: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_forms, "SAVES_MEMORY_FROM", AS_SHIPPED)
    most += 10 * (training and not HAS_TOP_HOOKS)  # PyTorch 2.6: any forward may be one that a checkpoint runs again
    unit = EMAUnit(64).to(device).train(training)
    x = torch.randn(2, 64, 14, 14, device=device, requires_grad=training)
    with torch.set_grad_enabled(training), Operations() as operations:
        unit(x)
    assert 30 < sum(operations.counts.values()) <= most
    assert (
        operations.counts["lerp"] == training
    )  # the moving average: hidden from selective checkpoints, not from a counter
    assert operations.counts["add_"] == 1 + training  # the residual, in the norm's output; and the norm counts batches


def test_autocast_reaches_the_products_over_positions() -> None:
    unit, x = EMAUnit(64, 16).eval(), torch.randn(2, 64, 48, 48)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Operations() as operations:
        unit(x)
    maps = 2 * 48 * 48 * 16
    assert {dtype for name, dtype, size in operations.results if "bmm" in name and size == maps} == {torch.bfloat16}


@pytest.mark.skipif(not hasattr(torch.ops.aten.bmm, "dtype"), reason="PyTorch 2.8 gives float32 out of half products")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_no_float32_over_positions_and_channels_on_a_gpu(dtype: torch.dtype) -> None:
    """On fake CUDA tensors: no copy of x in float32, and no product over positions with float32 operands."""
    unit = EMAUnit(64, 16, dtype=dtype).eval()
    like = {name: (t.shape, t.dtype) for name, t in unit.state_dict().items()}
    with FakeTensorMode():
        state = {name: torch.empty(shape, dtype=kind, device="cuda") for name, (shape, kind) in like.items()}
        x = torch.empty(2, 64, 65, 65, device="cuda", dtype=dtype)
        with torch.no_grad(), Operations() as operations:
            y = functional_call(unit, state, (x,))
    assert y.dtype == dtype
    assert operations.counts["bmm"] >= 6
    for name, result, size in operations.results:
        assert not (size == x.numel() and result == torch.float32), f"{name} writes float32 over positions and channels"
