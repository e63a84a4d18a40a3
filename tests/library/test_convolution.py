"""The 1×1 convolution as a matrix product is the convolution: its result, gradients and memory layout."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from ema_attention import EMAUnit, _convolution, _forms
from ema_attention._convolution import convolve, convolve_backward
from tests.units import formula, trained_like


@pytest.fixture
def by_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_forms, "has_amx", lambda: True)
    monkeypatch.setattr(_convolution, "conv2d_weight", None)  # it would be a convolution after all


@pytest.fixture(params=[0, 1, 3], ids="batch {}".format)
def batch(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(params=[2, 9], ids="positions {}".format)  # fewer than half of the channels, and more
def x(request: pytest.FixtureRequest, batch: int) -> Tensor:
    return torch.randn(batch, 6, request.param, dtype=torch.float64)


@pytest.fixture(params=[False, True], ids=["contiguous", "channels last"])
def laid_out(request: pytest.FixtureRequest, x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if request.param else x


def expected(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv1d(x, weight[..., None], bias)


@pytest.mark.usefixtures("by_product")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("has_gradient", [False, True])
def test_samples_share_a_product_where_a_copy_takes_less_time(
    dtype: torch.dtype, has_gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, products = torch.randn(32, 24, dtype=dtype, requires_grad=has_gradient), []
    monkeypatch.setattr(torch, "bmm", lambda *args, bmm=torch.bmm: products.append(args) or bmm(*args))
    is_copied = has_gradient or dtype == torch.bfloat16  # the weight, for each sample
    for positions, shared in ((3, True), (4, is_copied), (14, False)):  # 3·56 < 24·32/4 < 4·56
        x = torch.randn(2, 24, positions, dtype=dtype)
        products.clear()
        torch.testing.assert_close(convolve(weight, x), expected(weight, x))
        assert bool(products) != shared


@pytest.mark.usefixtures("by_product")
@pytest.mark.parametrize("has_bias", [False, True])
def test_product_equals_convolution(laid_out: Tensor, has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True) if has_bias else None
    x = laid_out.clone(memory_format=torch.preserve_format).requires_grad_()
    inputs = [t for t in (weight, x, bias) if t is not None]
    wanted = expected(weight, x, bias)
    grad = torch.randn_like(wanted)
    with monkeypatch.context() as patch:
        patch.setattr(F, "conv2d", None)
        y = convolve(weight, x, bias)
        assert gradcheck(convolve, (weight, x, bias))
        assert gradgradcheck(convolve, (weight, x, bias))
        assert_close = torch.testing.assert_close
        assert_close(
            convolve_backward(weight, x, grad), torch.autograd.grad(wanted, weight, grad, retain_graph=True)[0]
        )
    assert_close(y, wanted)
    assert (y.stride(1) < y.stride(2)) == (x.stride(1) < x.stride(2))
    for one, other in zip(*(torch.autograd.grad(t, inputs, grad) for t in (y, wanted)), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("has_bias", [False, True])
def test_without_amx_it_is_pytorchs_convolution(
    laid_out: Tensor, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_forms, "has_amx", lambda: False)
    weight = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64) if has_bias else None
    y, wanted = convolve(weight, laid_out, bias), expected(weight, laid_out, bias)
    torch.testing.assert_close(y, wanted)
    grad = torch.randn_like(y)
    torch.testing.assert_close(convolve_backward(weight, laid_out, grad), torch.autograd.grad(wanted, weight, grad)[0])


@pytest.mark.usefixtures("by_product")
def test_product_maps_over_weights_and_samples(x: Tensor) -> None:
    weights, bias = torch.randn(4, 8, 6, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(
        torch.vmap(convolve, (0, None, None))(weights, x, bias), torch.stack([expected(w, x, bias) for w in weights])
    )
    xs = torch.stack([x, 2 * x])
    torch.testing.assert_close(
        torch.vmap(convolve, (None, 0, None))(weights[0], xs, bias),
        torch.stack([expected(weights[0], x) for x in xs]) + bias[:, None],
    )


@pytest.mark.parametrize("gradient", ["none", "all"])
@pytest.mark.parametrize("side", [2, 4, 6, 48])  # one product, a product a sample, forms that save memory, folded
@pytest.mark.parametrize("has_amx", [False, True])
def test_unit_is_the_same_where_products_are_faster(
    has_amx: bool, side: int, gradient: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit, convolutions = trained_like(EMAUnit(16, 4, gradient=gradient)).double(), []
    x = torch.randn(3, 16, side, side, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(_forms, "has_amx", lambda: has_amx)
    monkeypatch.setattr(F, "conv2d", lambda *args, conv2d=F.conv2d: convolutions.append(args) or conv2d(*args))
    parameters = [x, *(p for p in unit.parameters() if p.requires_grad)]
    loss = torch.randn_like(x)
    for mode in (True, False):
        wanted = formula(unit.train(mode), x)
        expected = torch.autograd.grad(wanted, parameters, loss)
        convolutions.clear()
        y = unit(x)
        assert bool(convolutions) != has_amx
        torch.testing.assert_close(y, wanted)
        for one, other in zip(torch.autograd.grad(y, parameters, loss), expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("has_bias", [True, False])
def test_autocast_reaches_the_products(has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    unit, results = trained_like(EMAUnit(16, 4, gradient="all")), []
    if not has_bias:
        unit.conv1 = nn.Conv2d(16, 16, 1, bias=False)
    x = torch.randn(3, 16, 4, 4, requires_grad=True)
    for has_amx in (True, False):
        monkeypatch.setattr(_forms, "has_amx", lambda has_amx=has_amx: has_amx)
        unit.mu.copy_(F.normalize(torch.ones(16, 4).cumsum(1).cos(), dim=0))
        with torch.autocast("cpu", torch.bfloat16):
            y = unit(x)
        assert y.dtype == torch.float32
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *unit.conv1.parameters()])))
    for one, other in zip(*results, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 2e-2 * other.norm()
