"""TiledEMAttention equals em_attention of the tiles put together, with one tile in memory."""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from problems import Problem, problems
from torch import Tensor

from ema_attention import em_attention
from ema_attention.tiled import TiledEMAttention
from examples import larger_than_memory


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


def test_the_example_goes_on_wherever_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bases, stages, size = 8, 2, 300
    monkeypatch.setattr(larger_than_memory, "SECONDS_BETWEEN_SAVES", 0.0)
    larger_than_memory.make_features(tmp_path / "features.npy", 1_000, 16, size)
    stops = 0
    while not (tmp_path / "bases.npy").exists():
        run = larger_than_memory.attend(tmp_path, bases, stages, size)
        for _ in zip(range(3), run, strict=False):  # three tiles, the last of them not saved, and dead
            pass
        run.close()
        stops += 1
        assert stops < 20
    assert stops > 3
    features = torch.from_numpy(np.load(tmp_path / "features.npy"))
    mu = F.normalize(torch.randn(16, bases, generator=torch.Generator().manual_seed(0)), dim=0)
    expected = em_attention(features.T[None].double(), mu.double(), stages)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected.out[0].T, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "bases.npy"), expected.mu[0], rtol=0, atol=1e-5)


def test_the_example_measures_flat_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    larger_than_memory.main([str(tmp_path), "--positions", "300000", "--tile", "10000", "--bases", "8"])
    text = capsys.readouterr().out
    assert "300,000 positions of 32 channels" in text
    assert "reconstruction" in text
    peak, before = (float(number) for number in re.findall(r"(\d+) MiB", text))
    assert peak - before < 20  # the features are 37 MiB, as is the reconstruction


def test_the_example_says_what_is_wrong_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "features.npy", np.zeros(5))
    with pytest.raises(SystemExit) as end:
        larger_than_memory.main([str(tmp_path)])
    assert end.value.code == 2
    assert "must hold (N, C) float32; got (5,) float64" in capsys.readouterr().err


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
    with pytest.raises(TypeError, match=r"mu must be .* floating point dtype; got torch.int64"):
        TiledEMAttention(mu.long())
    with pytest.raises(ValueError, match=r"mu must be \(C', K\).*; got \(4,\)"):
        TiledEMAttention(mu[:, 0])
    em = TiledEMAttention(mu)
    with pytest.raises(ValueError, match="step needs the tiles of a stage; got none"):
        em.step()
    with pytest.raises(ValueError, match="attend needs a stage to have ended; got no step"):
        em.attend(x)
    with pytest.raises(ValueError, match=r"mu must be .* C' = 3.*; got \(1, 4, 2\)"):
        em.add(x[:, :3])
    with pytest.raises(ValueError, match=r"mask must be \(B, \*spatial\) = \(1, 5\); got \(1, 4\)"):
        em.add(x, torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"state_dict must hold bases of \(4, 2\); got \(1, 5, 2\)"):
        em.load_state_dict(TiledEMAttention(torch.ones(5, 2)).state_dict())
