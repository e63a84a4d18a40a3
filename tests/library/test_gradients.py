"""The three gradient modes, against autograd through plain formulas, finite differences, and each other."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from ema_attention import _forms, em_attention, functional
from tests.plain import em_attention as plain
from tests.problems import Problem, problems


@pytest.fixture(autouse=True, scope="module", params=["autograd", "one product"])
def _form(request: pytest.FixtureRequest) -> Iterator[None]:
    """How the gradient of x is computed: at any size by autograd through the stages, or at any size by one product."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "autograd":
            patch.setattr(functional, "run_with_one_product", None)
        patch.setattr(_forms, "SAVES_MEMORY_FROM", 0 if request.param == "one product" else 10**9)
        yield


def gradients(function, problem: Problem, **options: object) -> list[Tensor]:
    inputs = {"x": problem.x, "mu": problem.mu, "weight": problem.weight, "bias": problem.bias}
    inputs = {name: t.clone().requires_grad_() for name, t in inputs.items() if t is not None}
    results = function(**inputs, stages=problem.stages, scale=problem.scale, mask=problem.mask, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum((r * torch.randn(r.shape, generator=generator, dtype=r.dtype)).sum() for r in results)
    return torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)


@given(problems())
def test_all_and_last_equal_autograd_through_the_unfolded_form(problem: Problem) -> None:
    if problem.mask is not None:
        problem.mask.flatten(1)[:, 0] = True  # a basis that nothing moves is another matter
    for mode in ("all", "last"):
        for actual, expected in zip(
            gradients(em_attention, problem, gradient=mode), gradients(plain, problem, gradient=mode), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


def test_none_gives_constants() -> None:
    x = torch.randn(2, 6, 10, requires_grad=True)
    weight = torch.randn(6, 6, requires_grad=True)
    mu = F.normalize(torch.randn(6, 3), dim=0).requires_grad_()
    assert not any(t.requires_grad for t in em_attention(x, mu, 3, gradient="none", weight=weight))


def test_last_takes_the_bases_that_enter_the_last_stage_as_constants() -> None:
    x = torch.randn(2, 6, 10, requires_grad=True)
    mu = F.normalize(torch.randn(6, 3), dim=0).requires_grad_()
    for stages in (1, 3):
        out = em_attention(x, mu, stages, gradient="last").out
        grad_x, grad_mu = torch.autograd.grad(out.square().sum(), (x, mu), allow_unused=True)
        assert grad_mu is None
        assert grad_x.abs().sum() > 0


@pytest.mark.parametrize("mode", ["all", "last"])
@pytest.mark.parametrize("projection", ["none", "weight", "weight and bias"])
def test_gradcheck(mode: str, projection: str) -> None:
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    mu = F.normalize(torch.randn(4 if projection == "none" else 3, 3, dtype=torch.float64), dim=0)
    weight = None if projection == "none" else torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True) if projection == "weight and bias" else None
    mask = torch.tensor([[True, True, False], [False, True, True]])
    # finite differences see through "last"'s constants: with one stage there are none but mu
    stages = 2 if mode == "all" else 1
    mu.requires_grad_(mode == "all")

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        x, mu, weight, bias = (*tensors, *[None] * (4 - len(tensors)))
        return em_attention(x, mu, stages, gradient=mode, mask=mask, scale=1.5, weight=weight, bias=bias)

    inputs = [t for t in (x, mu, weight, bias) if t is not None]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, fast_mode=True)


def test_second_derivative_equals_that_of_the_plain_form() -> None:
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    mu = F.normalize(torch.randn(5, 3, dtype=torch.float64), dim=0)
    results = []
    for function in (em_attention, plain):
        out = function(x, mu, 3)[0]
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*results)


def test_gradient_reaches_the_old_bases_where_nothing_moves_them() -> None:
    mu = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    x = torch.zeros(1, 6, 4, dtype=torch.float64)
    assert gradcheck(lambda mu: em_attention(x, mu, 3).mu, mu)


def test_gradient_is_finite_where_a_basis_moves_nothing() -> None:
    mu = F.normalize(torch.randn(6, 3), dim=0).requires_grad_()
    x = torch.zeros(1, 6, 4, requires_grad=True)
    for mode in ("all", "last"):
        out = em_attention(x, mu, 2, gradient=mode).out
        for gradient in torch.autograd.grad(out.sum(), (x, mu), allow_unused=True, materialize_grads=True):
            assert gradient.isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_low_precision_gradient_comes_in_its_dtype_and_is_near(dtype: torch.dtype, tolerance: float) -> None:
    x, mu = torch.randn(2, 16, 40), F.normalize(torch.randn(16, 4), dim=0)
    upstream = torch.randn(2, 16, 40)
    grads = []
    for kind in (dtype, torch.float64):
        leaf = x.to(dtype).to(kind).requires_grad_()
        out = em_attention(leaf, mu.to(dtype).to(kind), 3).out
        grads.append(torch.autograd.grad(out, leaf, upstream.to(dtype).to(kind))[0])
    assert grads[0].dtype == dtype
    assert (grads[0].double() - grads[1]).norm() <= tolerance * grads[1].norm()


@pytest.mark.parametrize("mode", ["all", "last"])
@pytest.mark.parametrize("has_weight", [True, False])
def test_per_sample_gradients_by_vmap(mode: str, has_weight: bool) -> None:
    x, mu = torch.randn(3, 6, 10), F.normalize(torch.randn(6, 3), dim=0)
    weight = torch.randn(6, 6) if has_weight else None

    def loss(x: Tensor) -> Tensor:
        return em_attention(x[None], mu, 3, gradient=mode, weight=weight).out.square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss))(x)
    for sample, gradient in zip(x, per_sample, strict=True):
        leaf = sample.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf), leaf)
        torch.testing.assert_close(gradient, expected)
