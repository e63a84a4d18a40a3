"""Low precision: finite wherever the input is, and no worse than twice the plain implementation, against float64."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ema_attention import EMAUnit, _forms, _residual, _steps, em_attention, plain_form
from ema_attention._stages import run_with_one_product
from ema_attention._steps import Problem, expectation, maximization, prepare, statistics, sum_over_positions, unit_norm
from tests.plain import PublishedEMAU
from tests.plain import em_attention as plain_em_attention

CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
LOW = (torch.float16, torch.bfloat16)


def clusters(batch: int, channels: int, bases: int, positions: int, scale: float) -> tuple[Tensor, Tensor]:
    """Features with something to find, |x| up to about ``scale``, and bases to start from, in float64."""
    centres = F.normalize(torch.randn(channels, bases, dtype=torch.float64), dim=0)
    of = torch.randint(bases, (batch, positions))
    x = centres[:, of].movedim(0, 1) + 0.3 * torch.randn(batch, channels, positions, dtype=torch.float64)
    x = x / x.abs().max() * scale
    return x, F.normalize(centres + 0.3 * torch.randn_like(centres), dim=0)[None].expand(batch, -1, -1)


def worst(actual: Tensor, expected: Tensor) -> float:
    return (actual.double() - expected).abs().max().item()


def typical(actual: Tensor, expected: Tensor) -> float:
    return (actual.double() - expected).pow(2).mean().sqrt().item()


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_function_is_within_twice_the_plain_error(dtype: torch.dtype, scale: float, device: str) -> None:
    x, mu = (t.to(device, dtype) for t in clusters(2, 32, 8, 1000, scale))
    expected = em_attention(x.double(), mu.double(), 3)  # from the same rounded input: what is left is arithmetic
    plain = plain_em_attention(x, mu, 3)
    for actual, wanted, allowed in zip(em_attention(x, mu, 3), expected, plain, strict=True):
        assert actual.dtype == dtype
        assert typical(actual, wanted) <= 2 * typical(allowed, wanted)
        assert worst(actual, wanted) <= 2 * worst(allowed, wanted)


def unit_with_conv1_near_the_identity() -> EMAUnit:
    unit = EMAUnit(32, num_bases=8)
    with torch.no_grad():
        unit.conv1.weight.copy_(torch.eye(32)[..., None, None] + 0.05 * torch.randn(32, 32, 1, 1))
    return unit


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("training", [True, False])
def test_unit_is_within_twice_the_plain_error(training: bool, dtype: torch.dtype, autocast: bool, device: str) -> None:
    unit = unit_with_conv1_near_the_identity().to(device)
    x, mu = (t.to(device, dtype) for t in clusters(2, 32, 8, 900, 5.0))
    unit.mu.copy_(mu[:1])
    unit = unit if autocast else unit.to(dtype)
    truth = EMAUnit(32, num_bases=8).to(device).double()
    truth.load_state_dict(unit.state_dict())
    plain = PublishedEMAU(32, num_bases=8).to(device, unit.mu.dtype).train(training)
    plain.load_state_dict(unit.state_dict())
    unit.train(training)
    truth.train(training)
    x = x.unflatten(2, (30, 30))
    x = x.float() if autocast else x
    bases = unit.mu.clone()
    with torch.autocast(device, dtype) if autocast else nullcontext():
        allowed = plain(x)
        actual = unit(x)
    expected = truth(x.double())
    assert actual.dtype == x.dtype
    assert typical(actual, expected) <= 2 * typical(allowed, expected)
    assert worst(actual, expected) <= 2 * worst(allowed, expected)
    if training:
        assert not torch.equal(unit.mu, bases)
        torch.testing.assert_close(unit.mu.double(), truth.mu, rtol=0, atol=2e-2 if dtype is torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [*LOW, torch.float32, torch.float64])
@pytest.mark.parametrize("projected", [True, False])
def test_finite_for_large_values_and_many_positions(projected: bool, dtype: torch.dtype, device: str) -> None:
    """|x| up to 1e3 and 10⁵ positions all alike, where a float16 sum of either would overflow."""
    x = 1e3 * torch.ones(1, 8, 100_000, dtype=dtype, device=device)
    x[:, ::2] *= -1
    mu = F.normalize(torch.randn(8, 4), dim=0).to(device, dtype)
    weight = torch.randn(8, 8, device=device).to(dtype) if projected else None
    results = em_attention(x, mu, 3, weight=weight)
    for result in results:
        assert result.isfinite().all()
    # Finite is not enough: bases whose sums overflowed would have stayed where they were.
    expected = em_attention(x[..., :1].double(), mu.double(), 3, weight=None if weight is None else weight.double())
    torch.testing.assert_close(results.out.double(), expected.out.expand_as(results.out), rtol=0, atol=1e-2)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", LOW)
def test_unit_is_finite_for_large_values_and_many_positions(dtype: torch.dtype, autocast: bool, device: str) -> None:
    unit = EMAUnit(8, num_bases=4, gradient="all").to(device)
    x = torch.empty(1, 8, 250, 400, device=device).uniform_(-1e3, 1e3)
    unit, x = (unit, x) if autocast else (unit.to(dtype), x.to(dtype))
    x.requires_grad_()
    with torch.autocast(device, dtype) if autocast else nullcontext():
        y = unit(x)
    y.float().mean().backward()
    assert y.isfinite().all()
    assert unit.mu.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("size", [1e-30, 1e-21, 1e-3, 1.0, 1e30, 0.0, float("inf"), float("nan")])
def test_bases_of_half_precision_have_unit_norm_whatever_the_size_of_the_sums(size: float) -> None:
    """Squares of 1e-30 are 0, of 1e-21 inexact, of 1e30 infinite in float32; the last three have no direction."""
    directions, mu = torch.randn(1, 16, 4), F.normalize(torch.randn(1, 16, 4), dim=1)
    sums = directions.clone()
    sums[..., 1] *= size
    problem = Problem(torch.empty(1, 16, 9, dtype=torch.bfloat16), None, None, 1.0)
    expected = F.normalize(directions, dim=1)
    if size in (0.0, float("inf")) or size != size:
        expected[..., 1] = mu[..., 1]
    torch.testing.assert_close(maximization(problem, sums, mu), expected)


def test_only_sums_of_half_precision_take_the_faster_norm() -> None:
    sums, mu = torch.randn(4, 64, 16), F.normalize(torch.randn(1, 64, 16), dim=1)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        problem = Problem(torch.empty(4, 64, 9, dtype=dtype), None, None, 1.0)
        found[dtype] = maximization(problem, sums.clone(), mu)
        assert torch.equal(found[dtype], unit_norm(sums.clone(), mu, may_round=dtype == torch.bfloat16))
    assert not torch.equal(*found.values())


@pytest.mark.parametrize("dtype", LOW)
def test_products_that_give_float32_as_a_gpu_does(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def gives_float32(*operands: Tensor) -> bool:
        return all(operand.dtype == dtype for operand in operands)

    def bmm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
        return a.to(out_dtype) @ b.to(out_dtype)

    x, mu = (t.to(dtype) for t in clusters(2, 32, 8, 1000, 1.0))
    weight, bias = torch.eye(32) + 0.1 * torch.randn(32, 32), 0.3 * torch.randn(32)
    expected = em_attention(x.double(), mu.double(), 1, weight=weight.double(), bias=bias.double())
    for module in (_forms, _steps):
        monkeypatch.setattr(module, "multiplies_to_float32", gives_float32)
    monkeypatch.setattr(torch, "bmm", bmm)
    problem, start = prepare(x, mu, 1.0, None, weight, bias)
    assert problem.x.dtype == expectation(problem, start).dtype == dtype
    for actual, wanted in zip(em_attention(x, mu, 1, weight=weight, bias=bias), expected, strict=True):
        assert typical(actual, wanted) <= 3e-3 * wanted.pow(2).mean().sqrt()


def test_gradient_of_the_norm_of_half_precision() -> None:
    problem = Problem(torch.empty(1, 5, 9, dtype=torch.bfloat16), None, None, 1.0)
    sums, mu = torch.randn(1, 5, 3, dtype=torch.float64, requires_grad=True), torch.randn(1, 5, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda sums: maximization(problem, sums, mu), (sums,))


@pytest.mark.parametrize(
    "dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64), (torch.bfloat16, torch.float64)]
)
def test_the_wider_of_two_precisions_is_used(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, mu = (t.to(dtype) for t, dtype in zip(clusters(2, 32, 8, 100, 1.0), dtypes, strict=True))
    actual, expected = em_attention(x, mu, 3), em_attention(x.double(), mu.double(), 3)
    assert [t.dtype for t in actual] == [dtypes[0], dtypes[1], dtypes[0]]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype))
    exact = "z" if dtypes[0] == torch.float64 else "mu"  # out is of both
    assert worst(getattr(actual, exact), getattr(expected, exact)) < 1e-12


def test_sums_over_positions_are_kept_in_float32() -> None:
    problem = Problem(torch.randn(2, 6, 5000).bfloat16(), None, None, 1.0)
    z = torch.rand(2, 5000, 3).bfloat16()
    sums = statistics(problem, z)
    assert sums.dtype == sum_over_positions(problem, z).dtype == torch.float32
    torch.testing.assert_close(sums[:, -1], z.float().sum(1))


def test_float64_is_computed_in_float64() -> None:
    x, mu = clusters(2, 16, 4, 200, 3.0)
    expected = plain_em_attention(x, mu, 3)
    for actual, wanted in zip(em_attention(x, mu, 3), expected, strict=True):
        assert worst(actual, wanted) < 1e-9  # the plain form's 1e-6 in a column sum of some 50
    unit = EMAUnit(16, num_bases=4).double()
    assert unit(x.float().double()).dtype == torch.float64


@pytest.mark.parametrize("side", [6, 50])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_leaves_a_float64_unit_alone(training: bool, side: int) -> None:
    unit, x = EMAUnit(8, num_bases=4).double().train(training), torch.randn(2, 8, side, side).double()
    other = copy.deepcopy(unit)
    with torch.autocast("cpu", torch.bfloat16):
        y = unit(x)
    torch.testing.assert_close(y, other(x), rtol=0, atol=0)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", LOW)
def test_autocast_changes_no_bit_of_the_function(dtype: torch.dtype, device: str) -> None:
    x, mu = (t.to(device, torch.float32) for t in clusters(2, 16, 4, 200, 3.0))
    weight = torch.randn(16, 16, device=device)
    expected = em_attention(x, mu, 3, weight=weight)
    with torch.autocast(device, dtype):
        actual = em_attention(x, mu, 3, weight=weight)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


MAGNITUDES = (1e-3, 1.0, 30.0, 1e3)
SAMPLES = {60: 15, 1000: 7, 100_000: 1}
"""How many problems of so many positions: one position that changes its basis is much, so the median is held."""


def results_and_gradients(function, dtype: torch.dtype, tensors: dict[str, Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
    out, mu, z = function(leaves["x"], leaves["mu"], 3, weight=leaves.get("weight"), bias=leaves.get("bias"))
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream.to(dtype))
    return [t.detach().double() for t in (out, mu, z, *gradients)]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("projected", [False, True])
def test_results_and_every_gradient_are_within_twice_the_plain_error(
    projected: bool, magnitude: float, dtype: torch.dtype, device: str
) -> None:
    for positions, samples in SAMPLES.items():
        errors = []  # of each problem and tensor, ours and the plain form's
        for _ in range(samples):
            x, mu = clusters(2, 16, 4, positions, magnitude)
            tensors = {"x": x, "mu": mu[0]}
            if projected:
                tensors["weight"] = torch.eye(16) + 0.05 * torch.randn(16, 16)
                tensors["bias"] = 0.1 * magnitude * torch.randn(16)
            tensors = {name: t.to(device, dtype) for name, t in tensors.items()}
            upstream = torch.randn_like(x).to(device, dtype)
            truth, ours, plain = (
                results_and_gradients(function, kind, tensors, upstream)
                for function, kind in (
                    (em_attention, torch.float64),
                    (em_attention, dtype),
                    (plain_em_attention, dtype),
                )
            )
            columns = zip(truth, ours, plain, strict=True)
            errors.append([[typical(other, expected) for other in others] for expected, *others in columns])
        # where the plain form overflows, anything is as good
        for error, allowed in torch.tensor(errors).nan_to_num(torch.inf).median(0).values.tolist():
            assert error <= 2 * allowed + torch.finfo(dtype).smallest_normal, positions


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_an_eval_forward_in_blocks_is_the_plain_one(
    memory_format: torch.memory_format, dtype: torch.dtype, autocast: bool
) -> None:
    unit, x = unit_with_conv1_near_the_identity().eval(), torch.randn(2, 32, 12, 15).to(memory_format=memory_format)
    nn.init.uniform_(unit.conv2[1].running_var, 0.5, 2.0)
    unit, x = (unit, x) if autocast else (unit.to(dtype), x.to(dtype))
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = unit(x)
        with plain_form():
            plain = unit(x)
    assert y.dtype == plain.dtype
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y, plain, rtol=0.03, atol=0.06)
    assert _residual.fold_norm(unit.conv2)[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", LOW)
def test_the_plain_form_has_float32_products(dtype: torch.dtype) -> None:
    x, mu = (t.to(dtype) for t in clusters(2, 16, 4, 200, 3.0))
    with plain_form():
        actual = em_attention(x, mu.float(), 3)
    expected = em_attention(x.float(), mu.float(), 3)
    assert torch.equal(actual.mu, expected.mu)
    assert torch.equal(actual.z, expected.z.to(dtype))


def test_one_product_of_float16_features_as_a_gpu_keeps_them() -> None:
    """Sums over 10⁵ values of 100 leave the range of float16, and their gradients fall below it."""
    x, mu = clusters(1, 8, 4, 100_000, 100.0)
    weight, upstream = torch.eye(8) + 0.05 * torch.randn(8, 8), 0.1 * torch.randn(1, 8, 4)
    gradients = []
    for dtype, wide in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        features = x.half().to(dtype)
        leaves = [mu[0].to(wide).requires_grad_(), weight.to(wide).requires_grad_()]
        problem, start = prepare(features, leaves[0], 1.0, None, leaves[1], None)
        bases, _ = run_with_one_product(problem._replace(x=features), start, 2)
        gradients.append(torch.autograd.grad(bases, leaves, upstream.to(wide)))
    for actual, expected in zip(*gradients, strict=True):
        assert typical(actual, expected) <= 1e-2 * expected.pow(2).mean().sqrt()
