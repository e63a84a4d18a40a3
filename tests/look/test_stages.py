import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ema_attention import EMAUnit, collect_attention_maps, em_attention, em_stages, model_stages


def problem(*spatial: int, channels: int = 6, bases: int = 4, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, channels, *spatial), F.normalize(torch.randn(channels, bases), dim=0)


@pytest.mark.parametrize("spatial", [(9,), (4, 5), (2, 3, 4)])
def test_every_stage_is_what_so_many_stages_give(spatial: tuple[int, ...]) -> None:
    x, mu = problem(*spatial)
    mask = torch.rand(2, *spatial) > 0.3
    weight, bias = torch.randn(6, 6), torch.randn(6)
    for options in ({}, {"mask": mask}, {"weight": weight, "bias": bias, "scale": 2.0}):
        z, objective = em_stages(x, mu, 5, **options)
        assert z.shape == (5, 2, 4, *spatial)
        assert objective.shape == (6, 2)
        for stage in range(5):
            torch.testing.assert_close(z[stage], em_attention(x, mu, stage + 1, gradient="none", **options).z)


def test_the_objective_is_the_one_of_the_bases_before_and_after_each_stage() -> None:
    x, mu = (tensor.double() for tensor in problem(4, 5))
    mask = torch.rand(2, 4, 5) > 0.3
    weight, bias = torch.randn(6, 6).double(), torch.randn(6).double()
    _, objective = em_stages(x, mu, 3, scale=2.0, mask=mask, weight=weight, bias=bias)
    y = torch.einsum("dc,bchw->bdhw", weight, x) + bias[:, None, None]
    for stage in range(4):
        bases = mu.expand(2, -1, -1)
        if stage:
            bases = em_attention(x, mu, stage, scale=2.0, mask=mask, weight=weight, bias=bias).mu
        logits = 2.0 * torch.einsum("bdhw,bdk->bkhw", y, bases)
        expected = (logits.logsumexp(1) * mask).sum((1, 2))
        torch.testing.assert_close(objective[stage], expected)


def test_low_precision_runs_in_float32_and_keeps_no_graph() -> None:
    x, mu = problem(4, 5)
    z, objective = em_stages(x.half().requires_grad_(), mu.half(), 3)
    assert z.dtype == objective.dtype == torch.float32
    assert not z.requires_grad


def test_bad_arguments_are_refused_as_by_em_attention() -> None:
    x, mu = problem(4, 5)
    with pytest.raises(ValueError, match="stages must be at least 1; got 0"):
        em_stages(x, mu, 0)
    with pytest.raises(ValueError, match="mu must be"):
        em_stages(x, mu[:3], 2)


class Net(nn.Module):
    """Units of every kind: a replaced conv1, a mask, tokens; and an input that is changed in place afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first = EMAUnit(6, 4, stages=4, inner_channels=3, scale=2.0)
        self.first.conv1 = nn.Sequential(nn.Conv2d(6, 3, 1), nn.Dropout(0.5))
        self.tokens = EMAUnit(6, 5, channel_dim=-1)
        self.never = EMAUnit(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x, mask=torch.arange(7).expand(len(x), 5, 7) < 6)
        x.zero_()
        return self.tokens(y.flatten(2).mT)


@pytest.mark.parametrize("training", [True, False])
def test_the_last_maps_of_every_unit_are_those_collected(training: bool) -> None:
    net = Net().train(training)
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(2, 6, 5, 7)
    stages = model_stages(net, x.clone())
    assert net.training == net.tokens.training == training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with torch.no_grad(), collect_attention_maps(net.eval()) as maps:
        net(x)
    assert list(stages) == ["first", "tokens"]
    for name, (z, objective) in stages.items():
        unit = net.get_submodule(name)
        assert len(z) == unit.stages
        assert len(objective) == unit.stages + 1
        torch.testing.assert_close(z[-1], maps[name], rtol=1e-5, atol=1e-6)
    assert (stages["first"].z[..., 6] == 0).all()


def test_a_compiled_model_is_seen_into_and_not_compiled_again() -> None:
    graphs = []
    model = nn.Sequential(nn.Conv1d(8, 8, 1), EMAUnit(8, 4)).eval()
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    x = torch.randn(2, 8, 5)
    compiled(x)
    before = len(graphs)
    (stages,) = model_stages(compiled, x).values()
    torch.testing.assert_close(stages.z, model_stages(model, x)["1"].z)
    assert len(graphs) == before


def test_a_model_in_which_no_unit_runs_is_refused_and_left_alone() -> None:
    with pytest.raises(ValueError, match="an EMAUnit of the model must run; got a Conv2d in which none does"):
        model_stages(nn.Conv2d(3, 8, 3), torch.randn(1, 3, 9, 9))
    net = nn.Sequential(EMAUnit(8, 4), nn.Linear(3, 3))
    with pytest.raises(RuntimeError):
        model_stages(net, torch.randn(1, 8, 9))
    assert net.training
    assert not net[0]._forward_hooks
