"""By what a forward that is run again is recognised: a few sums over its input."""

import pytest
import torch

from ema_attention import _recomputation
from ema_attention._recomputation import Starts, _sample


def test_no_two_channels_and_positions_count_alike() -> None:
    samples = _sample(torch.eye(6 * 40).view(-1, 6, 40))
    assert samples.shape == (240, 4, 4)
    assert torch.pdist(samples.flatten(1)).min() > 1e-2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_counts_as_zero(value: float) -> None:
    x = torch.randn(2, 6, 40)
    x[1, 3, 7] = 0
    expected = _sample(x)
    x[1, 3, 7] = value
    assert torch.equal(_sample(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sums_are_of_one_precision_and_keep_no_graph(dtype: torch.dtype) -> None:
    x = torch.randn(2, 6, 40).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        sample = _sample(x)
    assert sample.dtype == torch.float32
    assert not sample.requires_grad
    torch.testing.assert_close(sample, _sample(x.detach().float()))


def test_an_input_is_found_again_if_it_is_nearly_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recomputation, "_checkpoints", list)
    monkeypatch.setattr(_recomputation, "_is_in_reentrant_checkpoint", lambda: True)
    starts, inputs, mus = Starts(), torch.randn(65, 2, 6, 40), torch.randn(65, 1, 6, 3)
    another = "in a reentrant checkpoint must get the same input when it runs again; got another one"
    with pytest.raises(RuntimeError, match=another):
        starts.find(inputs[64])
    with torch.no_grad():
        for x, mu in zip(inputs[:64], mus[:64], strict=True):
            starts.keep(x, mu)
    found = starts.find(1.01 * inputs[7])
    assert found is not None
    assert torch.equal(found, mus[7])
    with pytest.raises(RuntimeError, match=another):
        starts.find(1.2 * inputs[8])  # a sixth is more than noise
    with torch.no_grad():
        starts.keep(inputs[64], mus[64])
    with pytest.raises(RuntimeError, match="can run its latest 64 forwards again; got the input of none of them"):
        starts.find(inputs[7])  # has run again, so it is the first to be forgotten
