import copy
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from ema_attention import EMAUnit, collect_attention_maps, em_attention


def test_collects_the_maps_of_every_unit() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), EMAUnit(8, 4))
            self.tokens = EMAUnit(8, 5, channel_dim=-1, final_relu=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.tokens(self.stem(x).flatten(2).mT)

    net = Net().eval()
    x = torch.randn(2, 3, 10, 12)
    with collect_attention_maps(net) as maps:
        y = net(x)
    assert {name: tuple(z.shape) for name, z in maps.items()} == {"stem.1": (2, 4, 8, 10), "tokens": (2, 5, 80)}
    unit = net.stem[1]
    expected = em_attention(unit.conv1(net.stem[0](x)), unit.mu, 3).z
    torch.testing.assert_close(maps["stem.1"], expected)
    torch.testing.assert_close(net(x), y, rtol=0, atol=0)


def test_collects_only_while_open_and_keeps_no_graph() -> None:
    unit = EMAUnit(8, 4, gradient="all")
    with collect_attention_maps(unit) as maps:
        assert maps == {}
        unit(torch.randn(1, 8, 5))
        unit(torch.randn(2, 8, 6))
    assert list(maps) == [""]
    assert maps[""].shape == (2, 4, 6)
    assert not maps[""].requires_grad
    unit(torch.randn(3, 8, 7))
    assert maps[""].shape == (2, 4, 6)


def test_stops_collecting_after_an_error() -> None:
    unit = EMAUnit(8, 4)
    with pytest.raises(RuntimeError, match="stop"), collect_attention_maps(unit) as maps:
        raise RuntimeError("stop")
    unit(torch.randn(1, 8, 5))
    assert maps == {}


def test_a_model_without_a_unit_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="must contain an EMAUnit; got a Conv2d without one"),
        collect_attention_maps(nn.Conv2d(3, 8, 3)),
    ):
        pass


def test_a_compiled_model_is_seen_into() -> None:
    unit = EMAUnit(8, 4).eval()
    compiled = torch.compile(unit, backend="eager", fullgraph=True)
    x = torch.randn(2, 8, 5, 5)
    compiled(x)
    with collect_attention_maps(compiled) as maps:
        compiled(x)
    (z,) = maps.values()
    assert z.shape == (2, 4, 5, 5)


def test_contexts_may_be_nested() -> None:
    unit = EMAUnit(8, 4)
    with collect_attention_maps(unit) as outer:
        unit(torch.randn(1, 8, 5))
        with collect_attention_maps(unit) as inner:
            unit(torch.randn(1, 8, 6))
        unit(torch.randn(1, 8, 7))
    assert inner[""].shape == (1, 4, 6)
    assert outer[""].shape == (1, 4, 7)


def test_a_thread_collects_its_own_maps() -> None:
    unit = EMAUnit(6, 4).eval()
    both_collect = threading.Barrier(2)

    def collect(seed: int) -> bool:
        x = torch.randn(1, 6, 3, 3, generator=torch.Generator().manual_seed(seed))
        with collect_attention_maps(unit) as maps:
            both_collect.wait(5)
            unit(x)
            both_collect.wait(5)
        with collect_attention_maps(unit) as alone:
            unit(x)
        return torch.equal(maps[""], alone[""])

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(collect, range(2))) == [True, True]


@pytest.mark.filterwarnings("ignore:collect_attention_maps saw no unit")
def test_many_threads_open_and_close_collections_of_one_model() -> None:
    model = nn.Sequential(*(EMAUnit(2, 2) for _ in range(50)))

    def collect(_: int) -> None:
        for _ in range(50):
            with collect_attention_maps(model):
                pass

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(collect, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert [unit.map_collectors for unit in model] == [[]] * 50


@pytest.mark.parametrize("transform", [lambda f: f, torch.func.grad])
def test_maps_under_vmap_are_refused(transform: Callable) -> None:
    unit = EMAUnit(6, 4).eval()
    run = torch.func.vmap(transform(lambda x: unit(x[None]).sum()))
    with pytest.raises(ValueError, match=r"must see whole batches; got .* torch\.vmap"), collect_attention_maps(unit):
        run(torch.randn(2, 6, 3, 3))


def test_warns_if_nothing_was_collected() -> None:
    model = nn.Sequential(EMAUnit(6, 4))
    with pytest.warns(UserWarning, match="saw no unit of this Sequential run"), collect_attention_maps(model) as maps:
        copy.deepcopy(model)(torch.randn(2, 6, 3, 3))
    assert maps == {}
