"""em_attention: equal to the oracle, and the facts that hold for any input (DESIGN's section on facts)."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ema_attention import em_attention
from ema_attention._steps import Problem as EMProblem
from ema_attention.functional import expectation_maximization
from tests.oracle import em_attention as oracle_em_attention
from tests.oracle import objective
from tests.problems import UNIT_NORM_TOLERANCE, Problem, problems

ALL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@given(problems())
def test_equals_the_oracle(problem: Problem) -> None:
    p = problem
    out, mu, z = em_attention(p.x, p.mu, p.stages, **p.options)
    arrays = [None if t is None else t.numpy() for t in (p.weight, p.bias)]
    mask = None if p.mask is None else p.mask.flatten(1).numpy()
    expected = oracle_em_attention(p.x.flatten(2).numpy(), p.mu.numpy(), p.stages, p.scale, mask, *arrays)
    for actual, wanted in zip((out.flatten(2), mu, z.flatten(2)), expected, strict=True):
        np.testing.assert_allclose(actual.numpy(), wanted, rtol=1e-7, atol=1e-9)


@given(problems(ALL_DTYPES, magnitudes=(0.0, 1e-30, 1e-3, 1.0, 1e3), degenerate=True))
def test_bases_have_unit_norm_and_shapes_are_right(problem: Problem) -> None:
    p = problem
    out, mu, z = em_attention(p.x, p.mu, p.stages, **p.options)
    channels, bases = p.mu.shape[-2:]
    assert out.shape == (len(p.x), channels, *p.x.shape[2:])
    assert mu.shape == (len(p.x), channels, bases)
    assert z.shape == (len(p.x), bases, *p.x.shape[2:])
    assert out.dtype == z.dtype == p.x.dtype
    assert mu.dtype == p.mu.dtype
    norms = mu.double().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=UNIT_NORM_TOLERANCE[mu.dtype])


@given(problems(ALL_DTYPES, magnitudes=(1.0, 1e3), degenerate=True))
def test_maps_are_probabilities(problem: Problem) -> None:
    p = problem
    z = em_attention(p.x, p.mu, p.stages, **p.options).z.double()
    sums = z.sum(1)
    assert (z >= 0).all()
    takes_part = torch.ones_like(sums, dtype=torch.bool) if p.mask is None else p.mask
    torch.testing.assert_close(sums, takes_part.double(), rtol=0, atol=10 * UNIT_NORM_TOLERANCE[p.x.dtype])


@given(problems())
def test_out_is_a_convex_combination_of_the_bases(problem: Problem) -> None:
    p = problem
    out, mu, _ = em_attention(p.x, p.mu, p.stages, scale=p.scale, weight=p.weight, bias=p.bias)
    out = out.flatten(2)
    assert (out <= mu.amax(2, keepdim=True) + 1e-12).all()
    assert (out >= mu.amin(2, keepdim=True) - 1e-12).all()


@given(problems(magnitudes=(0.1, 1.0, 30.0), projected=False))
def test_objective_never_falls(problem: Problem) -> None:
    p = problem
    for x, mu in zip(p.x.flatten(2), p.mu.expand(len(p.x), -1, -1), strict=True):
        values = [objective(x.numpy(), mu.numpy(), p.scale)]
        for stages in range(1, 6):
            after = em_attention(x[None], mu, stages, scale=p.scale).mu[0]
            values.append(objective(x.numpy(), after.numpy(), p.scale))
        steps = np.diff(values)
        assert (steps >= -1e-12 * np.abs(values[1:])).all(), values


@given(problems(), st.randoms(use_true_random=False))
def test_permuting_positions_permutes_maps_and_leaves_bases(problem: Problem, random) -> None:
    p = problem
    x = p.x.flatten(2)
    mask = None if p.mask is None else p.mask.flatten(1)
    order = list(range(x.shape[2]))
    random.shuffle(order)
    out, mu, z = em_attention(x, p.mu, p.stages, **{**p.options, "mask": mask})
    permuted_mask = None if mask is None else mask[:, order]
    out_p, mu_p, z_p = em_attention(x[:, :, order], p.mu, p.stages, **{**p.options, "mask": permuted_mask})
    torch.testing.assert_close(out_p, out[:, :, order])
    torch.testing.assert_close(z_p, z[:, :, order])
    torch.testing.assert_close(mu_p, mu)


@given(problems(), st.randoms(use_true_random=False))
def test_permuting_bases_permutes_bases_and_maps_and_leaves_out(problem: Problem, random) -> None:
    p = problem
    order = list(range(p.mu.shape[-1]))
    random.shuffle(order)
    out, mu, z = em_attention(p.x, p.mu, p.stages, **p.options)
    out_p, mu_p, z_p = em_attention(p.x, p.mu[..., order], p.stages, **p.options)
    torch.testing.assert_close(out_p, out)
    torch.testing.assert_close(mu_p, mu[..., order])
    torch.testing.assert_close(z_p, z[:, order])


@given(problems())
def test_a_sample_does_not_depend_on_its_batch(problem: Problem) -> None:
    p = problem
    together = em_attention(p.x, p.mu, p.stages, **p.options)
    for b in range(len(p.x)):
        mu = p.mu[b : b + 1] if p.mu.dim() == 3 and len(p.mu) == len(p.x) else p.mu
        mask = None if p.mask is None else p.mask[b : b + 1]
        alone = em_attention(p.x[b : b + 1], mu, p.stages, **{**p.options, "mask": mask})
        for one, all_ in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_[b])


@given(problems(masked=True))
def test_what_a_masked_position_holds_does_not_matter(problem: Problem) -> None:
    p = problem
    reference = em_attention(p.x, p.mu, p.stages, **p.options)
    assert (reference.out.movedim(1, -1)[~p.mask] == 0).all()
    assert (reference.z.movedim(1, -1)[~p.mask] == 0).all()
    for rubbish in (1e6, float("inf"), float("nan")):
        x = p.x.masked_fill(~p.mask[:, None], rubbish)
        for one, other in zip(em_attention(x, p.mu, p.stages, **p.options), reference, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@given(problems(masked=True))
def test_mask_equals_leaving_the_positions_out(problem: Problem) -> None:
    p = problem
    whole = em_attention(p.x, p.mu, p.stages, **p.options)
    for b, keep in enumerate(p.mask.flatten(1)):
        if not keep.any():
            continue
        mu = p.mu[b] if p.mu.dim() == 3 and len(p.mu) == len(p.x) else p.mu
        part = em_attention(
            p.x.flatten(2)[b : b + 1, :, keep], mu, p.stages, scale=p.scale, weight=p.weight, bias=p.bias
        )
        torch.testing.assert_close(whole.out.flatten(2)[b][:, keep], part.out[0])
        torch.testing.assert_close(whole.mu[b], part.mu[0])


@given(problems(projected=True))
def test_folded_projection_equals_the_formed_one(problem: Problem) -> None:
    p = problem
    x = p.x if p.mask is None else p.x.masked_fill(~p.mask[:, None], 0.0)
    formed = F.conv1d(x.flatten(2), p.weight[..., None], p.bias).unflatten(2, p.x.shape[2:])
    folded = em_attention(p.x, p.mu, p.stages, **p.options)
    plain = em_attention(formed, p.mu, p.stages, scale=p.scale, mask=p.mask)
    for one, other in zip(folded, plain, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("gradient", ["none", "last", "all"])
def test_sums_of_every_stage_are_completed_with_those_held_elsewhere(gradient: str) -> None:
    x, mu = torch.randn(2, 6, 40, dtype=torch.float64), F.normalize(torch.randn(1, 6, 3, dtype=torch.float64), dim=1)
    elsewhere = torch.randn(2, 7, 3, dtype=torch.float64)  # of the features, and in the last row of the maps
    problem = EMProblem(x, None, None, 1.0)
    found, z = expectation_maximization(problem, mu, 3, gradient, reduce=lambda sums: sums + elsewhere)
    for _ in range(3):
        expected_z = (x.mT @ mu).softmax(-1)
        mu = F.normalize(x @ expected_z + elsewhere[:, :-1], dim=1)
    torch.testing.assert_close(found, mu)
    torch.testing.assert_close(z, expected_z)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("projected", [False, True])
def test_memory_format_goes_through(memory_format: torch.memory_format, projected: bool) -> None:
    x = torch.randn(2, 6, 5, 7)
    mu = F.normalize(torch.randn(6, 4), dim=0)
    weight = torch.randn(6, 6) if projected else None
    expected = em_attention(x, mu, 3, weight=weight)
    result = em_attention(x.to(memory_format=memory_format), mu, 3, weight=weight)
    assert result.out.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(result.out, expected.out, rtol=1e-5, atol=1e-6)


def test_non_contiguous_equals_contiguous() -> None:
    x = torch.randn(2, 12, 9, 8)[:, ::2, 1:, ::3]
    mu = F.normalize(torch.randn(6, 8), dim=0)[:, ::2]
    for one, other in zip(em_attention(x, mu, 3), em_attention(x.contiguous(), mu.contiguous(), 3), strict=True):
        torch.testing.assert_close(one, other)


def test_arguments_are_left_as_they_were() -> None:
    x, mu = torch.randn(2, 6, 10), F.normalize(torch.randn(1, 6, 3), dim=1)
    mask = torch.rand(2, 10) < 0.5
    copies = x.clone(), mu.clone(), mask.clone()
    em_attention(x, mu, 3, mask=mask)
    for one, other in zip((x, mu, mask), copies, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-9)])
def test_cuda_equals_cpu(dtype: torch.dtype, tolerance: float) -> None:
    x, mu = torch.randn(2, 32, 17, 19), F.normalize(torch.randn(32, 8), dim=0)
    weight, bias = torch.randn(32, 32) / 6, torch.randn(32)
    expected = em_attention(x.double(), mu.double(), 3, weight=weight.double(), bias=bias.double())
    on_gpu = [t.to("cuda", dtype) for t in (x, mu, weight, bias)]
    result = em_attention(*on_gpu[:2], 3, weight=on_gpu[2], bias=on_gpu[3])
    for one, other in zip(result, expected, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=tolerance, atol=tolerance)
