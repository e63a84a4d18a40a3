"""What is only for speed equals the plain form, is used where it may be and nowhere else, and saves what it says."""

from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from ema_attention import EMAUnit, _blocks, _forms, _residual, em_attention, functional, plain_form
from ema_attention._blocks import by_blocks
from tests.units import formula, trained_like


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the fast functions that ran."""
    names: list[str] = []

    def spy(module: ModuleType, name: str) -> Callable[..., object]:
        function = getattr(module, name)

        def wrapper(*args: object, **kwargs: object) -> object:
            names.append(name)
            return function(*args, **kwargs)

        return wrapper

    for module, name in (
        (functional, "run_with_one_product"),
        (_residual, "reconstruct_conv"),
        (_residual, "inference_tail"),
    ):
        monkeypatch.setattr(module, name, spy(module, name))
    return names


def test_used_where_they_may_be(calls: list[str]) -> None:
    x = torch.randn(2, 8, 48, 48)
    unit = EMAUnit(8, 4, gradient="all")
    unit(x)
    assert calls == ["run_with_one_product", "reconstruct_conv"]
    calls.clear()
    with torch.no_grad():
        unit.eval()(x)
    assert calls == ["inference_tail"]
    calls.clear()
    unit.requires_grad_(False)(x)
    assert calls == ["inference_tail"]
    calls.clear()
    EMAUnit(8, 4, gradient="none")(x)
    assert calls == ["reconstruct_conv"]


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 2.5), (torch.float64, 2.5), (torch.bfloat16, 4.0)])
@pytest.mark.parametrize("has_amx", [True, False])
def test_conv1_is_folded_beyond_its_limit(
    dtype: torch.dtype, share: float, has_amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_forms, "has_amx", lambda: has_amx)
    conv1, limit = nn.Conv2d(8, 8, 1), int(share * 2 * 3 * 4)

    def form(positions: int, conv1: nn.Module = conv1) -> str:
        return _forms.projection_form(conv1, torch.empty(1, 8, positions, dtype=dtype), num_bases=4, stages=3)

    assert [form(1), form(limit), form(limit + 1)] == [*2 * ["multiplied" if has_amx else "called"], "folded"]
    assert form(limit + 1, nn.Conv2d(8, 8, 3, padding=1)) == "called"
    with plain_form():
        assert form(limit + 1) == form(1) == "called"
    with monkeypatch.context() as patch:
        patch.setattr(_forms, "is_tracing", lambda: True)
        assert form(1) == "folded"
    for is_tracing in (False, True):
        monkeypatch.setattr(_forms, "is_tracing", lambda is_tracing=is_tracing: is_tracing)
        with FakeTensorMode():
            assert _forms.projection_form(conv1, torch.empty(1, 8, limit + 1, device="cuda"), 4, 3) == "called"


def with_hook_on(get: Callable[[EMAUnit], nn.Module]) -> Callable[[EMAUnit], None]:
    return lambda unit: get(unit).register_forward_hook(lambda module, args, y: 2 * y)


def train_norm(unit: EMAUnit) -> None:
    unit.conv2[1].train()


def forget_statistics(unit: EMAUnit) -> None:
    unit.conv2[1] = nn.BatchNorm2d(8, track_running_stats=False).eval()


def drop_affine(unit: EMAUnit) -> None:
    unit.conv2[1] = nn.BatchNorm2d(8, affine=False).eval()


def other_norm(unit: EMAUnit) -> None:
    unit.conv2[1] = nn.GroupNorm(2, 8)


def add_bias(unit: EMAUnit) -> None:
    unit.conv2[0] = nn.Conv2d(8, 8, 1)


def drop_bias(unit: EMAUnit) -> None:
    unit.conv2[1].bias = None


def patch_forward(unit: EMAUnit) -> None:
    unit.conv2[0].forward = lambda x: 2 * nn.Conv2d.forward(unit.conv2[0], x)


def append_dropout(unit: EMAUnit) -> None:
    unit.conv2.append(nn.Dropout2d(0.5)).eval()


def append_sigmoid(unit: EMAUnit) -> None:
    unit.conv2.append(nn.Sigmoid())


def empty(unit: EMAUnit) -> None:
    unit.conv2 = nn.Sequential()


def grouped_conv(unit: EMAUnit) -> None:
    unit.conv2[0] = nn.Conv2d(8, 8, 1, groups=2, bias=False)


def parametrize(unit: EMAUnit) -> None:
    torch.nn.utils.parametrizations.weight_norm(unit.conv2[0])
    unit.conv2[0].parametrizations.weight.original0.data.mul_(3)


def quantized_like_subclass(unit: EMAUnit) -> None:
    class Doubling(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    conv = Doubling(8, 8, 1, bias=False)
    unit.conv2[0] = conv


@pytest.mark.parametrize(
    "change",
    [
        with_hook_on(lambda unit: unit.conv2),
        with_hook_on(lambda unit: unit.conv2[0]),
        with_hook_on(lambda unit: unit.conv2[1]),
        train_norm,
        forget_statistics,
        drop_affine,
        other_norm,
        add_bias,
        drop_bias,
        patch_forward,
        append_dropout,
        append_sigmoid,
        empty,
        grouped_conv,
        parametrize,
        quantized_like_subclass,
    ],
)
def test_a_changed_conv2_is_called_as_it_is(change: Callable[[EMAUnit], None], calls: list[str]) -> None:
    unit = trained_like(EMAUnit(8, 4)).eval()
    change(unit)
    unit.double()
    x = torch.randn(2, 8, 48, 48, dtype=torch.float64)
    with torch.no_grad():
        y = unit(x)
        assert "inference_tail" not in calls
        torch.testing.assert_close(y, formula(unit, x))
    gradients = []
    for run in (unit, lambda x: formula(unit, x)):
        leaf = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(run(leaf).square().sum(), [leaf, *unit.conv2.parameters()]))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("wanted", ["x", "conv1.weight", "conv2.0.weight", "conv2.1.weight", "conv2.1.bias"])
def test_one_gradient_alone_is_enough_to_be_differentiated(wanted: str, calls: list[str]) -> None:
    unit = trained_like(EMAUnit(8, 4, gradient="all")).eval().double().requires_grad_(False)
    x = torch.randn(2, 8, 48, 48, dtype=torch.float64)
    leaf = {"x": x, **dict(unit.named_parameters())}[wanted].requires_grad_()
    gradients = [torch.autograd.grad(y.square().sum(), leaf)[0] for y in (unit(x), formula(unit, x))]
    torch.testing.assert_close(*gradients)
    unit.gradient = "none"
    if wanted != "conv1.weight":
        gradients = [torch.autograd.grad(y.square().sum(), leaf)[0] for y in (unit(x), formula(unit, x))]
        torch.testing.assert_close(*gradients)
    assert "inference_tail" not in calls


@pytest.mark.parametrize(("padding", "is_pointwise"), [(0, True), ("same", True), ("valid", True), (1, False)])
def test_padding_that_adds_nothing_is_allowed(padding: int | str, is_pointwise: bool) -> None:
    assert _forms.is_pointwise(nn.Conv2d(8, 8, 1, padding=padding)) == is_pointwise


def test_a_norm_of_another_precision_is_called_as_it_is(calls: list[str]) -> None:
    unit, x = trained_like(EMAUnit(8, 4)).eval().bfloat16(), torch.randn(2, 8, 48, 48).bfloat16()
    unit.conv2[1].float()
    with torch.no_grad():
        torch.testing.assert_close(unit(x), formula(unit, x), rtol=3e-2, atol=3e-2)
    assert not calls


def test_a_convolution_of_several_positions_is_called_as_it_is() -> None:
    """It gets the positions in one row, (B, C, 1, N)."""
    unit = EMAUnit(8, 4).double().eval()
    unit.conv1 = nn.Conv2d(8, 8, (1, 3), padding="same").double()
    unit.conv2[0] = nn.Conv2d(8, 8, (1, 3), padding="same", bias=False).double()
    x = torch.randn(2, 8, 48, 48, dtype=torch.float64)
    with torch.no_grad():
        y = unit(x)
        with plain_form():
            torch.testing.assert_close(y, unit(x))


@pytest.mark.parametrize("side", [6, 48])
def test_hooks_on_all_modules_see_what_a_norm_returned(side: int) -> None:
    unit, x = EMAUnit(8, 4, gradient="all"), torch.randn(2, 8, side, side, requires_grad=True)
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        if isinstance(module, nn.BatchNorm2d):
            seen["output"], seen["as it was"] = y, y.detach().clone()

    def look(module: nn.Module, *gradients: object) -> None:
        seen.setdefault("backward", x)

    handles = [
        nn.modules.module.register_module_forward_hook(keep),
        nn.modules.module.register_module_full_backward_hook(look),
    ]
    try:
        unit(x).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(seen["output"], seen["as it was"], rtol=0, atol=0)
    assert "backward" in seen


def wide_conv(unit: EMAUnit) -> None:
    unit.conv2[0] = nn.Conv2d(8, 8, 3, padding=1, bias=False)


@pytest.mark.parametrize("side", [4, 48])
@pytest.mark.parametrize(
    ("change", "is_row"), [(lambda unit: None, True), (wide_conv, False), (append_dropout, False), (other_norm, False)]
)
def test_only_what_sees_single_positions_gets_them_in_one_row(
    change: Callable[[EMAUnit], None], is_row: bool, side: int
) -> None:
    unit = trained_like(EMAUnit(8, 4)).eval()
    change(unit)
    x, seen = torch.randn(2, 8, side, side), []
    expected = formula(unit, x)
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: seen.append((module, args[0])))
    try:
        torch.testing.assert_close(unit(x), expected)
    finally:
        handle.remove()
    shapes = [tensor.shape for module, tensor in seen if module is unit.conv2[1]]
    assert shapes == [(2, 8, 1, side * side) if is_row else (2, 8, side, side)]


def test_autocast_folds_the_norm_too(calls: list[str]) -> None:
    unit = trained_like(EMAUnit(8, 4)).eval()
    x = torch.randn(2, 8, 48, 48)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = unit(x)
    assert calls == ["inference_tail"]
    torch.testing.assert_close(y, unit(x), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("positions", [50, 150])  # one block, and several
@pytest.mark.parametrize("channels_last", [False, True])
def test_results_are_of_the_precision_that_operands_are_promoted_to(positions: int, channels_last: bool) -> None:
    mu, z, weight = torch.randn(2, 5, 3).double(), torch.rand(2, positions, 3).double(), torch.randn(4, 5).double()
    x = torch.randn(2, positions, 4).mT if channels_last else torch.randn(2, 4, positions)
    y = _residual.reconstruct_conv(mu, z, weight, x)
    torch.testing.assert_close(y, weight @ F.relu(mu @ z.mT))
    tail = _residual.inference_tail(x, mu, z, weight, torch.ones(4, 1), False)
    torch.testing.assert_close(tail, x + y + 1)
    half = _residual.inference_tail(x, mu.bfloat16(), z.bfloat16(), weight, torch.ones(4, 1), False)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, tail.float(), rtol=3e-2, atol=1e-1)
    assert y.stride() == tail.stride() == half.stride() == x.stride()


def test_a_traced_unit_takes_the_plain_path(calls: list[str]) -> None:
    unit = trained_like(EMAUnit(8, 4)).eval()
    x, larger = torch.randn(1, 8, 6, 6), torch.randn(1, 8, 40, 30)
    exported = torch.export.export(unit, (x,), dynamic_shapes=({2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},))
    assert not calls
    torch.testing.assert_close(exported.module()(larger), unit(larger))


@pytest.mark.parametrize("gradient", ["all", "last"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_one_product_equals_autograd_through_the_loop(gradient: str, channels_last: bool, calls: list[str]) -> None:
    x = torch.randn(2, 8, 30, dtype=torch.float64)
    x = (x.mT.contiguous().mT if channels_last else x).requires_grad_()
    mu = F.normalize(torch.randn(6, 4, dtype=torch.float64), dim=0).requires_grad_(gradient == "all")
    weight = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    inputs = [t for t in (x, mu, weight, bias) if t.requires_grad]
    results = []
    for form in (nullcontext, plain_form):
        with form():
            out, bases, z = em_attention(x, mu, 3, gradient=gradient, weight=weight, bias=bias)
        loss = out.square().sum() + bases.pow(3).sum() + z.exp().sum()
        results.append((out, bases, z, *torch.autograd.grad(loss, inputs)))
    assert calls == ["run_with_one_product"]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert results[0][3].stride() == x.stride()


def test_a_loss_on_masked_maps_has_the_gradient_of_the_plain_form() -> None:
    """Of an entropy the gradient is infinite where a map is 0, as it is where a position takes no part."""
    x, mu = torch.randn(2, 8, 50, 50), F.normalize(torch.randn(8, 4), dim=0)
    mask, gradients = torch.rand(2, 50, 50) < 0.7, []
    for form in (nullcontext(), plain_form()):
        source = x.clone().requires_grad_()
        with form:
            torch.special.entr(em_attention(source, mu, 3, mask=mask).z).sum().backward()
        gradients.append(source.grad)
    assert gradients[1].isfinite().all()
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_reconstruct_conv_gradients(channels_last: bool) -> None:
    mu = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    z = torch.rand(2, 7, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    like = torch.empty(2, 7, 4, dtype=torch.float64).mT if channels_last else torch.empty(2, 4, 7, dtype=torch.float64)

    def function(mu: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return _residual.reconstruct_conv(mu, z, weight, like)

    torch.testing.assert_close(function(mu, z, weight), weight @ F.relu(mu @ z.mT))
    assert function(mu, z, weight).stride() == like.stride()
    assert gradcheck(function, (mu, z, weight))
    assert gradgradcheck(function, (mu, z, weight))


@pytest.mark.parametrize(("gradient", "limit"), [("none", 1.3), ("last", 1.5), ("all", 1.8)])
def test_memory_held_from_forward_to_backward(gradient: str, limit: float) -> None:
    """Beyond input, output and parameters, in outputs, at the published C / K = 8 and T = 3."""
    unit = EMAUnit(64, 8, gradient=gradient).train()
    x = torch.randn(2, 64, 48, 48, requires_grad=True)
    known = {t.untyped_storage().data_ptr() for t in (x, *unit.parameters())}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = unit(x)
    known.add(y.untyped_storage().data_ptr())
    ratio = sum(size for pointer, size in held.items() if pointer not in known) / (y.numel() * 4)
    assert 1 < ratio <= limit


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_arithmetic_of_an_eval_forward(device: str) -> None:
    """C²N + (2T+1)NCK for the unit with its projection folded, and 2T·C(C+1)K that do not grow with N."""
    channels, bases, stages, size = 64, 16, 3, 30
    unit = EMAUnit(channels, bases, stages).eval().to(device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unit(torch.randn(1, channels, size, size, device=device))
    positions = size * size
    per_position = positions * channels * (channels + (2 * stages + 1) * bases)
    fixed = 2 * stages * channels * (channels + 1) * bases
    assert counter.get_total_flops() == 2 * (per_position + fixed)


@pytest.mark.parametrize("norm_layer", [nn.SyncBatchNorm, lambda c: nn.GroupNorm(2, c)])
def test_other_norms_keep_what_does_not_depend_on_the_norm(norm_layer, calls: list[str]) -> None:
    unit = EMAUnit(8, 4, norm_layer=norm_layer).eval()
    x = torch.randn(2, 8, 48, 48)
    torch.testing.assert_close(unit(x), formula(unit, x))
    assert calls == ["reconstruct_conv"]
    with torch.no_grad():
        torch.testing.assert_close(unit(x), formula(unit, x))
    assert calls[1] == ("inference_tail" if norm_layer is nn.SyncBatchNorm else "reconstruct_conv")


def test_positions_are_taken_in_blocks_that_stay_in_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_blocks, "_BYTES", 2**19)
    sizes = []

    def function(a: Tensor, b: Tensor) -> Tensor:
        sizes.append(a.shape[-1])
        return a * b.sum(-2, keepdim=True)

    def run(a: Tensor, b: Tensor) -> Tensor:
        return by_blocks(function, a, b, result=lambda: torch.empty_like(a))

    a, b = torch.randn(2, 512, 1000), torch.randn(2, 3, 1000)
    expected = a * b.sum(1, keepdim=True)
    torch.testing.assert_close(run(a, b), expected)
    assert sizes == [256, 256, 256, 232]  # the largest multiple of 64 positions that fits
    sizes.clear()
    run(a[..., :256], b[..., :256])
    run(torch.randn(2, 4096, 100), b[..., :100])  # at least 64, though they do not fit
    assert sizes == [256, 64, 36]
    sizes.clear()
    torch.testing.assert_close(torch.vmap(run, (0, None))(a[None], b)[0], expected)
    run(a.to("meta"), b.to("meta"))
    assert sizes == [1000, 1000]


def test_an_ensemble_by_vmap() -> None:
    units = [trained_like(EMAUnit(8, 4)).eval() for _ in range(3)]
    x = torch.randn(2, 8, 6, 6)
    parameters, buffers = torch.func.stack_module_state(units)

    def one(parameters, buffers):
        return torch.func.functional_call(units[0], (parameters, buffers), (x,))

    with torch.no_grad():
        together = torch.func.vmap(one)(parameters, buffers)
        torch.testing.assert_close(together, torch.stack([unit(x) for unit in units]))


def test_nothing_folded_is_kept() -> None:
    unit = trained_like(EMAUnit(8, 4)).eval()
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        unit(x)
        unit.conv2[1].weight.mul_(2)
        torch.testing.assert_close(unit(x), formula(unit, x))
