"""TiledEMAttention equals em_attention of the tiles put together, with one tile in memory."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ema_attention import em_attention
from ema_attention.tiled import TiledEMAttention
from tests.problems import Problem, problems


def run(em: TiledEMAttention, stages: int, tiles: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor, Tensor]:
    for _ in range(stages):
        for tile, mask in tiles:
            em.add(tile, mask)
        em.step()
    parts = [em.attend(tile, mask) for tile, mask in tiles]
    return torch.cat([p.out for p in parts], 2), parts[0].mu, torch.cat([p.z for p in parts], 2)


@given(problems((torch.float32, torch.float64)), st.integers(1, 6))
def test_equals_the_whole(problem: Problem, size: int) -> None:
    p = problem
    tiles = p.x.split(size, 2)
    masks = [None] * len(tiles) if p.mask is None else p.mask.split(size, 1)
    em = TiledEMAttention(p.mu, scale=p.scale, weight=p.weight, bias=p.bias)
    expected = em_attention(p.x, p.mu, p.stages, **p.options)
    for actual, wanted in zip(run(em, p.stages, list(zip(tiles, masks, strict=True))), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture
def memmap(tmp_path: Path) -> np.memmap:
    features = np.memmap(tmp_path / "features", np.float32, "w+", shape=(20_000, 32))
    features[:] = np.random.default_rng(0).standard_normal(features.shape, dtype=np.float32)
    return features


def rows(memmap: np.memmap, size: int) -> Iterator[Tensor]:
    for start in range(0, len(memmap), size):
        yield torch.from_numpy(memmap[start : start + size]).T[None]  # (1, C, size)


def test_a_memmap_equals_the_whole_to_1e_5(memmap: np.memmap) -> None:
    mu = F.normalize(torch.randn(32, 8), dim=0)
    em = TiledEMAttention(mu)
    for _ in range(3):
        for tile in rows(memmap, 777):  # a generator: consumed by each pass
            em.add(tile)
        em.step()
    out = torch.cat([em.attend(tile).out for tile in rows(memmap, 1_234)], 2)
    expected = em_attention(torch.from_numpy(np.array(memmap)).T[None].double(), mu.double(), 3)
    torch.testing.assert_close(em.mu.double(), expected.mu, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.double(), expected.out, rtol=0, atol=1e-5)


def test_a_stopped_run_goes_on_from_its_state(memmap: np.memmap) -> None:
    mu = F.normalize(torch.randn(32, 8), dim=0)
    tiles = [(tile, None) for tile in rows(memmap, 1_000)]
    through = TiledEMAttention(mu)
    expected = run(through, 2, tiles)
    stopped, file = TiledEMAttention(mu), io.BytesIO()
    for tile, _ in tiles:
        stopped.add(tile)
    stopped.step()
    for tile, _ in tiles[:7]:
        stopped.add(tile)
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    goes_on = TiledEMAttention(mu)
    goes_on.load_state_dict(torch.load(file, weights_only=True))
    for tile, _ in tiles[7:]:
        goes_on.add(tile)
    goes_on.step()
    assert torch.equal(goes_on.mu, through.mu)
    assert torch.equal(torch.cat([goes_on.attend(tile).out for tile, _ in tiles], 2), expected[0])


def test_tiles_of_another_batch_size_are_refused() -> None:
    em = TiledEMAttention(F.normalize(torch.randn(8, 2), dim=0))
    em.add(torch.randn(1, 8, 5))
    with pytest.raises(ValueError, match="batch size of the tiles before it, 1; got 3"):
        em.add(torch.randn(3, 8, 5))
    em.step()
    with pytest.raises(ValueError, match="batch size of the tiles before it, 1; got 3"):
        em.attend(torch.randn(3, 8, 5))
    em = TiledEMAttention(F.normalize(torch.randn(2, 8, 2), dim=1))
    with pytest.raises(ValueError, match="batch size of mu, 2; got 3"):
        em.add(torch.randn(3, 8, 5))
    em.add(torch.randn(2, 8, 5))
    em.step()
    with pytest.raises(ValueError, match="batch size of the tiles before it, 2; got 3"):
        em.add(torch.randn(3, 8, 5))


def test_a_tile_that_is_not_finite_is_refused_and_changes_nothing() -> None:
    tiles = torch.randn(2, 1, 8, 5)
    em, expected = (TiledEMAttention(F.normalize(torch.ones(8, 2), dim=0)) for _ in range(2))
    em.add(tiles[0])
    with pytest.raises(ValueError, match="x must be finite"):
        em.add(torch.full((1, 8, 5), float("nan")))
    em.add(tiles[1])
    expected.add(tiles[0])
    expected.add(tiles[1])
    em.step()
    expected.step()
    torch.testing.assert_close(em.mu, expected.mu)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mu": np.ones((8, 2))}, TypeError, "mu must be a Tensor; got ndarray"),
        ({"scale": -1.0}, ValueError, "scale must be positive"),
        ({"weight": torch.ones(7, 8)}, ValueError, "mu must be .* C' = 7"),
        ({"bias": torch.ones(8)}, ValueError, "bias needs a weight"),
    ],
)
def test_the_constructor_says_what_is_wrong(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TiledEMAttention(**{"mu": torch.ones(8, 2), **options})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mu": torch.ones(1, 7, 2)}, ValueError, r"must hold tensors .*; got {'mu': \(1, 7, 2\)}"),
        ({"mu": None}, ValueError, "must hold tensors .*; got {}"),
        ({"mu": torch.ones(2, 8, 2).long()}, TypeError, "mu must be float16, .*; got torch.int64"),
        ({"mu": torch.full((1, 8, 2), torch.nan)}, ValueError, "must hold finite tensors; mu is not"),
        ({"sums": torch.ones(1, 8, 2)}, ValueError, "must hold tensors"),
        ({"sums": torch.ones(2, 9, 2), "mu_before": torch.ones(3, 8, 2)}, ValueError, "with one B; got"),
        ({"sums": 1}, TypeError, "sums must be a Tensor; got int"),
        ({"more": None}, ValueError, "must hold tensors"),
    ],
)
def test_a_state_of_another_problem_is_refused(change: dict, error: type[Exception], message: str) -> None:
    em = TiledEMAttention(torch.ones(8, 2))
    with pytest.raises(error, match=message):
        em.load_state_dict({**em.state_dict(), **change})
    with pytest.raises(TypeError, match="state_dict must be a dict; got NoneType"):
        em.load_state_dict(None)


def test_sums_of_many_tiles_do_not_lose_digits() -> None:
    """A large sum that cancels, between a thousand small ones that float32 would drop."""
    x = torch.tensor([[[1.0], [1e-4]]])
    em = TiledEMAttention(F.normalize(torch.ones(2, 1), dim=0))
    large, small = torch.tensor([[[1e4], [1e4]]]), torch.tensor([[[0.0], [1e-4]]])
    for tile in (large, *[small] * 1_000, -large, x):
        em.add(tile)
    em.step()
    expected = F.normalize(torch.tensor([[1.0], [0.1 + 1e-4]], dtype=torch.float64), dim=0)
    torch.testing.assert_close(em.mu[0].double(), expected, rtol=1e-6, atol=0)


def test_autocast_does_not_reach_the_sums() -> None:
    x, mu = torch.randn(1, 16, 300), F.normalize(torch.randn(16, 4), dim=0)
    weight = torch.randn(16, 16)
    expected = run(TiledEMAttention(mu, weight=weight), 2, [(x, None)])
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(TiledEMAttention(mu, weight=weight), 2, [(x, None)])
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_errors_say_what_was_expected() -> None:
    mu, x = torch.ones(4, 2), torch.ones(1, 4, 5)
    with pytest.raises(TypeError, match=r"mu must be float16, .* or float64; got torch.int64"):
        TiledEMAttention(mu.long())
    with pytest.raises(ValueError, match=r"mu must be \(C', K\).*; got \(4,\)"):
        TiledEMAttention(mu[:, 0])
    em = TiledEMAttention(mu)
    with pytest.raises(ValueError, match="step needs the tiles of a stage; got none"):
        em.step()
    with pytest.raises(ValueError, match="attend needs a stage to have ended; got no step"):
        em.attend(x)
    for tile in (em.add, em.attend):
        with pytest.raises(TypeError, match="x must be a Tensor; got ndarray"):
            tile(x.numpy())
    with pytest.raises(ValueError, match="x must have 4 channels; got 3"):
        em.add(x[:, :3])
    with pytest.raises(ValueError, match=r"mask must be \(B, \*spatial\) = \(1, 5\); got \(1, 4\)"):
        em.add(x, torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"state_dict must hold tensors .*'mu': \(4, 2\).*; got .*'mu': \(1, 5, 2\)"):
        em.load_state_dict(TiledEMAttention(torch.ones(5, 2)).state_dict())


def test_its_state_is_its_own() -> None:
    mu = F.normalize(torch.randn(1, 6, 3, dtype=torch.float64), dim=1)
    em, state = TiledEMAttention(mu), {"mu": mu.float(), "mu_before": mu.float(), "sums": None}
    before = mu.clone()
    mu.zero_()
    torch.testing.assert_close(em.mu, before)
    em.mu.zero_()
    torch.testing.assert_close(em.mu, before)
    em.load_state_dict(state)
    state["mu"].zero_()
    assert em.state_dict()["mu"].dtype == torch.float64
    torch.testing.assert_close(em.mu, before, rtol=1e-6, atol=1e-6)


def test_a_state_goes_on_in_a_projected_space() -> None:
    mu, weight, x = F.normalize(torch.randn(6, 3), dim=0), torch.randn(6, 9), torch.randn(2, 9, 5)
    one, other = (TiledEMAttention(mu, weight=weight) for _ in range(2))
    one.add(x)
    other.load_state_dict(one.state_dict())
    for em in (one, other):
        em.step()
    assert torch.equal(other.attend(x).out, one.attend(x).out)
