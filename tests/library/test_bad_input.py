"""What happens on every mistake a user can make: a clear error, or a result that is stated here."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ema_attention import EMAUnit, em_attention

NAN, INF = math.nan, math.inf


def arguments(**changed: Any) -> dict[str, Any]:
    """A call of em_attention that is in order, but for what is changed; callables change what is there."""
    right: dict[str, Any] = {
        "x": torch.randn(2, 4, 5, 6),
        "mu": F.normalize(torch.randn(3, 2), dim=0),
        "stages": 2,
        "mask": torch.rand(2, 5, 6) < 0.5,
        "weight": torch.randn(3, 4),
        "bias": torch.randn(3),
    }
    return {**right, **{name: new(right[name]) if callable(new) else new for name, new in changed.items()}}


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": lambda x: x[0, 0]}, ValueError, r"x must be \(B, C, \*spatial\) with C at least 1; got \(5, 6\)"),
    ({"x": lambda x: x[:, :0]}, ValueError, r"C at least 1; got \(2, 0, 5, 6\)"),
    ({"x": lambda x: x[:, :3]}, ValueError, r"weight must be \(C', C\) with C = 3 as in x; got \(3, 4\)"),
    ({"x": lambda x: x.long()}, TypeError, "x must be float16, bfloat16, float32 or float64; got torch.int64"),
    ({"x": lambda x: x.to(torch.float8_e5m2)}, TypeError, "x must be float16, .* or float64; got torch.float8_e5m2"),
    ({"x": lambda x: x > 0}, TypeError, "x must be float16, bfloat16, float32 or float64; got torch.bool"),
    ({"x": lambda x: x.cfloat()}, TypeError, "x must be float16, bfloat16, float32 or float64; got torch.complex64"),
    ({"x": lambda x: x.numpy()}, TypeError, "x must be a Tensor; got ndarray"),
    ({"mu": lambda mu: mu.tolist()}, TypeError, "mu must be a Tensor; got list"),
    ({"mu": lambda mu: mu[:2]}, ValueError, r"mu must be .* C' = 3, B = 2 and K at least 1; got \(2, 2\)"),
    ({"mu": lambda mu: mu[:, :0]}, ValueError, r"K at least 1; got \(3, 0\)"),
    (
        {"x": torch.randn(2, 6, 4), "mu": torch.randn(4, 2), "mask": None, "weight": None, "bias": None},
        ValueError,
        r"C' = 6, B = 2 .*; got \(4, 2\) \(tokens \(B, N, C\) are x.mT here\)$",
    ),
    ({"mu": lambda mu: mu[:, 0]}, ValueError, r"mu must be .*; got \(3,\)"),
    ({"mu": lambda mu: mu.expand(5, 3, 2)}, ValueError, r"mu must be .* B = 2 .*; got \(5, 3, 2\)"),
    ({"mu": lambda mu: mu.long()}, TypeError, "mu must be float16, bfloat16, float32 or float64; got torch.int64"),
    ({"mu": lambda mu: mu.to("meta")}, ValueError, "mu must be on the device of x, cpu; got meta"),
    ({"stages": 0}, ValueError, "stages must be at least 1; got 0"),
    ({"stages": -1}, ValueError, "stages must be at least 1; got -1"),
    ({"stages": 2.0}, TypeError, "stages must be an int; got float"),
    ({"stages": True}, TypeError, "stages must be an int; got bool"),
    ({"stages": np.int64(2)}, TypeError, "stages must be an int; got int64"),
    ({"scale": 0.0}, ValueError, "scale must be positive and finite; got 0.0"),
    ({"scale": -1.0}, ValueError, "scale must be positive and finite; got -1.0"),
    ({"scale": NAN}, ValueError, "scale must be positive and finite; got nan"),
    ({"scale": INF}, ValueError, "scale must be positive and finite; got inf"),
    ({"gradient": "some"}, ValueError, r"gradient must be one of \('all', 'last', 'none'\); got 'some'"),
    ({"mask": lambda mask: mask[:, 1:]}, ValueError, r"mask must be \(B, \*spatial\) = \(2, 5, 6\); got \(2, 4, 6\)"),
    ({"mask": lambda mask: mask[:, None]}, ValueError, r"mask must be .*; got \(2, 1, 5, 6\)"),
    ({"mask": lambda mask: mask.float()}, TypeError, "mask must be bool, True where .*; got torch.float32"),
    ({"mask": lambda mask: mask.numpy()}, TypeError, "mask must be a Tensor; got ndarray"),
    ({"mask": lambda mask: mask.to("meta")}, ValueError, "mask must be on the device of x, cpu; got meta"),
    ({"weight": lambda weight: weight[None]}, ValueError, r"weight must be \(C', C\).*; got \(1, 3, 4\)"),
    ({"weight": lambda weight: weight.int()}, TypeError, "weight must be float16, bfloat16, float32 or float64"),
    ({"weight": None}, ValueError, "bias needs a weight to go with; got weight=None"),
    ({"bias": lambda bias: bias[:2]}, ValueError, r"bias must be \(C',\) = \(3,\) as in weight; got \(2,\)"),
    (
        {"bias": lambda bias: bias.int()},
        TypeError,
        "bias must be float16, bfloat16, float32 or float64; got torch.int32",
    ),
]


@pytest.mark.parametrize(("changed", "error", "message"), ERRORS)
def test_em_attention_says_what_was_expected_and_what_came(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        em_attention(**arguments(**changed))


def test_what_the_table_changes_is_otherwise_in_order() -> None:
    em_attention(**arguments())


UNIT_ERRORS: list[tuple[Any, type[Exception], str]] = [
    (np.ones((2, 4, 6)), TypeError, "x must be a Tensor; got ndarray"),
    (torch.randn(4, 6), ValueError, r"x must have 3 dimensions or more and 4 channels in dimension 1; got \(4, 6\)"),
    (torch.randn(2, 3, 6), ValueError, r"4 channels in dimension 1; got \(2, 3, 6\)$"),
    (torch.randn(2, 6, 4), ValueError, r"dimension 1; got \(2, 6, 4\) \(tokens and .* need channel_dim=-1\)$"),
    (torch.randn(2, 6, 6, 4), ValueError, r"in dimension 1; got \(2, 6, 6, 4\) \(tokens and .* need channel_dim=-1\)$"),
    (torch.randn(4, 6, 6), ValueError, r"got \(4, 6, 6\) \(a single sample needs a batch dimension: x\[None\]\)$"),
    (torch.ones(2, 4, 6, dtype=torch.long), TypeError, "x must have the dtype of the unit, torch.float32; got .*int64"),
    (torch.randn(2, 4, 6).double(), TypeError, "x must have the dtype of the unit, torch.float32; got torch.float64"),
    (torch.randn(2, 4, 6).half(), TypeError, "x must have the dtype of the unit, torch.float32; got torch.float16"),
    (torch.randn(2, 4, 6).to(torch.float8_e5m2), TypeError, "x must have the dtype of the unit.*; got .*float8_e5m2"),
    (torch.randn(2, 4, 6).cfloat(), TypeError, "x must have the dtype of the unit, torch.float32; got torch.complex64"),
]


@pytest.mark.parametrize(("x", "error", "message"), UNIT_ERRORS)
def test_a_unit_that_raises_has_not_moved_its_bases(x: Tensor, error: type[Exception], message: str) -> None:
    unit = EMAUnit(4, num_bases=3)
    before = unit.mu.clone()
    with pytest.raises(error, match=message):
        unit(x)
    assert torch.equal(unit.mu, before)


def test_neither_has_one_that_batch_norm_or_autocast_stops() -> None:
    unit = EMAUnit(8, num_bases=4)
    old = unit.mu.clone()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        unit(torch.randn(1, 8, 1, 1))
    for dtype in (torch.int64, torch.float64):
        with torch.autocast("cpu"), pytest.raises(TypeError, match=r"dtype of the unit, torch\.float32; got torch\."):
            unit(torch.ones(2, 8, 3, 3, dtype=dtype))
    assert torch.equal(unit.mu, old)


def test_an_empty_batch_gives_an_empty_result() -> None:
    p = arguments(x=lambda x: x[:0], mask=lambda mask: mask[:0])
    out, mu, z = em_attention(**p)
    assert (out.shape, mu.shape, z.shape) == ((0, 3, 5, 6), (0, 3, 2), (0, 2, 5, 6))


def test_no_positions_leave_the_bases_where_they_were() -> None:
    p = arguments(x=lambda x: x[..., :0], mask=lambda mask: mask[..., :0])
    out, mu, z = em_attention(**p)
    assert (out.shape, z.shape) == ((2, 3, 5, 0), (2, 2, 5, 0))
    torch.testing.assert_close(mu, p["mu"].expand(2, 3, 2))


def test_a_mask_that_is_all_false_leaves_the_bases_and_gives_zeros() -> None:
    p = arguments(mask=torch.zeros(2, 5, 6, dtype=torch.bool))
    out, mu, z = em_attention(**p)
    assert not out.any()
    assert not z.any()
    torch.testing.assert_close(mu, p["mu"].expand(2, 3, 2))


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_a_sample_that_is_not_finite_shows_it_and_its_bases_stay_where_they_were(poison: float) -> None:
    p = arguments(mask=None)
    p["x"][0, 0, 0, 0] = poison
    out, mu, z = em_attention(**p)
    assert not out[0].isfinite().all()
    assert not z[0].isfinite().all()
    assert z[1].isfinite().all()
    assert out[1].isfinite().all()
    torch.testing.assert_close(mu[0], p["mu"])


def test_features_of_zeros_leave_the_bases_where_they_were() -> None:
    p = arguments(x=torch.zeros_like, mask=None, bias=None)
    torch.testing.assert_close(em_attention(**p).mu, p["mu"].expand(2, 3, 2))


def test_bases_whose_sums_overflow_stay_where_they_were() -> None:
    x, mu = torch.zeros(1, 4, 10), torch.eye(4)[:, :2]
    x[:, 0] = 3e38
    torch.testing.assert_close(em_attention(x, mu, 2).mu[0], mu)


def test_bases_that_are_not_finite_show_it_everywhere() -> None:
    out, _, z = em_attention(**arguments(mu=lambda mu: mu * NAN, mask=None))
    assert out.isnan().all()
    assert z.isnan().all()


@given(
    shape=st.tuples(st.integers(0, 3), st.just(4), st.integers(1, 4), st.integers(1, 4)),
    poison=st.sampled_from([0.0, 1e-38, 1.0, 1e3, 1e30, 3e38, NAN, INF, -INF]),
    everywhere=st.booleans(),
    masked=st.sampled_from([None, 0.0, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    gradient=st.sampled_from(["all", "last", "none"]),
    seed=st.integers(0, 2**31 - 1),
)
def test_no_input_puts_a_nan_into_the_buffer(
    shape: tuple[int, ...],
    poison: float,
    everywhere: bool,
    masked: float | None,
    dtype: torch.dtype,
    gradient: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    unit = EMAUnit(4, num_bases=3, gradient=gradient, norm_layer=torch.nn.Identity, dtype=dtype)
    before = unit.mu.clone()
    x = torch.randn(shape)
    x = x * poison if everywhere else x.where(torch.rand(shape) < 0.9, poison)
    mask = None if masked is None else torch.rand(shape[0], *shape[2:]) < masked
    for _ in range(2):
        unit(x.to(dtype), mask)
    norms = unit.mu.double().norm(dim=1)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1e-2}.get(dtype, 1e-5)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=tolerance)
    if 0 in shape or masked == 0.0:
        torch.testing.assert_close(unit.mu, before, rtol=0, atol=tolerance)
