"""Several ranks: gloo processes on one machine, the truth being one process that sees everything."""

import contextlib
import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ema_attention import EMAUnit, em_attention
from ema_attention.sharded import sharded_em_attention
from tests.ranks import run_on_ranks


def fail_on_one_rank() -> int:
    if dist.get_rank() == 1:
        raise ValueError("on purpose")
    return dist.get_rank()


def test_a_rank_that_fails_is_reported_and_nobody_waits_for_it(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"rank 1: .*\n(.*\n)*ValueError: on purpose"):
        run_on_ranks(fail_on_one_rank, 2, tmp_path)


def assert_all_close(actual: list[Tensor], expected: list[Tensor], rtol: float = 1e-9, atol: float = 1e-11) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# One sample over many ranks.

GRADIENTS = ("all", "last", "none")


def sharded_problem() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": normal(2, 5, 7, 4),
        "mu": F.normalize(normal(6, 3), dim=0),
        "weight": normal(6, 5),
        "bias": normal(6),
        "mask": normal(2, 7, 4) > -1,
        "cotangent": normal(2, 6, 7, 4),
    }


def attend(function: Callable[..., Any], p: dict[str, Tensor], gradient: str) -> list[Tensor]:
    """Outputs, and the gradients of a loss, of each input that has one."""
    inputs = {name: p[name].clone().requires_grad_() for name in ("x", "mu", "weight", "bias")}
    out, mu, z = function(**inputs, stages=3, scale=2.0, mask=p["mask"], gradient=gradient)
    results = [out, mu, z]
    if out.requires_grad:
        loss = (out * p["cotangent"]).sum() + (z**2).sum()
        results += torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)
    return [result.detach() for result in results]


def attend_sharded() -> list[list[Tensor]]:
    rank, rows = dist.get_rank(), [3, 0, 3, 1][: dist.get_world_size()]  # rank 1 has no position at all
    rows[-1] = 7 - sum(rows[:-1])
    p = sharded_problem()
    for name in ("x", "mask", "cotangent"):
        p[name] = p[name].split(rows, dim=p[name].dim() - 2)[rank]
    return [attend(sharded_em_attention, p, gradient) for gradient in GRADIENTS]


@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_attention_is_exact(ranks: int, tmp_path: Path) -> None:
    by_rank = run_on_ranks(attend_sharded, ranks, tmp_path)
    for mode, gradient in enumerate(GRADIENTS):
        shards = list(zip(*(results[mode] for results in by_rank), strict=True))  # by result, then by rank
        expected = attend(em_attention, sharded_problem(), gradient)
        assert len(shards) == len(expected)
        out, mu, z, *gradients = shards
        assert_all_close([torch.cat(out, 2), *mu, torch.cat(z, 2)], [expected[0], *[expected[1]] * ranks, expected[2]])
        if gradients:
            of_x, *of_parameters = gradients
            assert_all_close([torch.cat(of_x, 2), *map(sum, of_parameters)], expected[3:])


def count_communication() -> list[int]:
    """Numbers this rank put into all-reduces, for two sizes, forward and then with backward."""
    counts = []
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        counts[-1] += tensor.numel()
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    for positions in (10, 1000):
        x, mu = torch.randn(2, 8, positions, requires_grad=True), F.normalize(torch.randn(8, 4), dim=0)
        counts.append(0)
        out = sharded_em_attention(x, mu, 3).out
        counts.append(0)
        out.sum().backward()
    dist.all_reduce = all_reduce
    return counts


def test_a_stage_communicates_k_times_c_plus_1_numbers_a_sample(tmp_path: Path) -> None:
    stages, samples, channels, bases = 3, 2, 8, 4
    numbers = stages * samples * bases * (channels + 1)
    for counts in run_on_ranks(count_communication, 2, tmp_path):
        assert counts == [numbers] * 4


def test_sharded_attention_needs_a_process_group() -> None:
    with pytest.raises(ValueError, match=r"needs torch\.distributed; got no initialised process group"):
        sharded_em_attention(torch.ones(1, 4, 5), torch.ones(4, 2), 1)


# One batch over many ranks.

SHARES = {"equal": [2, 2], "unequal": [3, 1], "a rank with none": [4, 0]}


def small_unit(**options: object) -> EMAUnit:
    """A unit without batch statistics, which would be a rank's own."""
    torch.manual_seed(2)
    return EMAUnit(6, num_bases=4, gradient="all", norm_layer=nn.Identity, **options).double()


def steps(unit: EMAUnit, model: nn.Module, batches: list[Tensor], scale: float, accumulate: bool = False) -> None:
    """One optimizer step a batch, or one for all of them, on ``scale`` times the sum over samples of a loss."""
    optimizer = torch.optim.SGD(unit.parameters(), lr=0.1)
    for i, x in enumerate(batches, 1):
        last = not accumulate or i == len(batches)
        with contextlib.nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync():
            (scale * model(x).pow(2).mean((1, 2)).sum()).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()


def state(unit: EMAUnit) -> dict[str, Tensor]:
    tensors = unit.state_dict()
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}


def batches() -> Tensor:
    return torch.randn(3, 4, 6, 25, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def train_ddp() -> dict[str, dict[str, Tensor]]:
    results = {}
    for name, shares in SHARES.items():
        unit = small_unit()
        mine = [x.split(shares)[dist.get_rank()] for x in batches()]
        steps(unit, DistributedDataParallel(unit), mine, scale=dist.get_world_size() / 4, accumulate=name == "equal")
        results[name] = state(unit)
    return results


def train_fsdp() -> dict[str, dict[str, Tensor]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    results = {}
    for name, shares in SHARES.items():
        unit = small_unit()
        fully_shard(unit, mesh=mesh)
        mine = [x.split(shares)[dist.get_rank()] for x in batches()]
        steps(unit, unit, mine, scale=dist.get_world_size() / 4, accumulate=name == "equal")
        results[name] = state(unit)
    return results


@pytest.mark.parametrize(
    "train",
    [
        train_ddp,
        pytest.param(
            train_fsdp,
            marks=pytest.mark.skipif(
                torch.__version__.startswith("2.6."), reason="fully_shard does not run on the CPU in PyTorch 2.6"
            ),
        ),
    ],
)
def test_data_parallel_training_equals_one_process(
    train: Callable[[], dict[str, dict[str, Tensor]]], tmp_path: Path
) -> None:
    by_rank = run_on_ranks(train, 2, tmp_path)
    for name in SHARES:
        alone = small_unit()
        steps(alone, alone, list(batches()), scale=1 / 4, accumulate=name == "equal")
        for rank in by_rank:
            assert_all_close(list(rank[name].values()), list(state(alone).values()))


def train_unfrozen() -> dict[str, Tensor]:
    unit = small_unit()
    unit.gradient = "none"
    unit.requires_grad_(True)  # as a framework's loader or a callback does
    mine = [x.split(2)[dist.get_rank()] for x in batches()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps(unit, DistributedDataParallel(unit), mine, scale=dist.get_world_size() / 4)
    return state(unit)


def test_data_parallel_training_goes_on_with_conv1_unfrozen(tmp_path: Path) -> None:
    alone = small_unit()
    alone.gradient = "none"
    steps(alone, alone, list(batches()), scale=1 / 4)
    for rank in run_on_ranks(train_unfrozen, 2, tmp_path):
        assert_all_close(list(rank.values()), list(state(alone).values()))


def move_bases_with_a_nan() -> list[Tensor]:
    moved = []
    for spoilt in ([1], [0, 1]):
        unit = small_unit()
        x = batches()[0].split(2)[dist.get_rank()].clone()
        if dist.get_rank() in spoilt:
            x[0, 0, 0] = float("nan")
        unit(x)
        moved.append(unit.mu)
    return moved


def test_a_rank_that_is_not_finite_spoils_nobodys_bases(tmp_path: Path) -> None:
    untouched, without_it = small_unit(), small_unit()
    without_it(batches()[0][:2])
    assert not torch.equal(without_it.mu, untouched.mu)
    for one, both in run_on_ranks(move_bases_with_a_nan, 2, tmp_path):
        torch.testing.assert_close(one, without_it.mu)
        assert torch.equal(both, untouched.mu)


def move_bases_in_groups() -> dict[str, Tensor]:
    """Two models in a group each, and a unit that keeps its bases to itself; the fourth rank's is in no group."""
    rank = dist.get_rank()
    x = batches()[0][rank : rank + 1]
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    with pytest.raises(ValueError, match="group must be a process group with this rank in it, or None; got"):
        EMAUnit(6, process_group=groups[rank < 2])
    with pytest.raises(ValueError, match="group must be a process group with this rank in it, or None; got"):
        sharded_em_attention(x, torch.ones(6, 4).double(), 1, group=groups[rank < 2])
    unit = small_unit(process_group=groups[rank >= 2])
    unit = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(unit))
    assert unit.process_group is groups[rank >= 2]
    unit(x)
    alone = pickle.loads(pickle.dumps(small_unit(sync_bases=False)))
    for _ in range(1 + rank):  # and so as often as it likes
        alone(x)
    assert small_unit(decay=1)(x).isfinite().all()
    return {"group": unit.mu, "alone": alone.mu}


def test_groups_and_units_of_their_own_never_meet(tmp_path: Path) -> None:
    for rank, moved in enumerate(run_on_ranks(move_bases_in_groups, 4, tmp_path)):
        group, alone, x = small_unit(), small_unit(), batches()[0]
        group(x.split(2)[rank // 2])
        for _ in range(1 + rank):
            alone(x[rank : rank + 1])
        torch.testing.assert_close(moved["group"], group.mu)
        torch.testing.assert_close(moved["alone"], alone.mu)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_checkpointed_forward_communicates_once(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, all_reduce = [], dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **kwargs: calls.append(1) or all_reduce(*args, **kwargs))
    x = batches()[0].requires_grad_()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        checkpoint(small_unit(), x + value, use_reentrant=True).sum().backward()
    finally:
        dist.destroy_process_group()
    assert len(calls) == 1


def test_code_compiled_before_there_are_ranks_communicates_with_them() -> None:
    unit, graphs = small_unit(), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(unit, fullgraph=True, backend=backend)
    compiled(batches()[0])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        compiled(batches()[0])
    finally:
        dist.destroy_process_group()
    assert ["all_reduce" in graph for graph in graphs] == [False, True]


def two_gpus_over_nccl() -> dict[str, Tensor]:
    rank = dist.get_rank()
    unit = nn.SyncBatchNorm.convert_sync_batchnorm(EMAUnit(6, num_bases=4, gradient="all")).cuda(rank)
    x = batches()[0].float().split([3, 1])[rank].cuda(rank)
    DistributedDataParallel(unit, device_ids=[rank])(x).sum().backward()
    return {name: t.cpu() for name, t in unit.state_dict().items()}


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_nccl_ranks_hold_the_same_state(tmp_path: Path) -> None:
    one, other = run_on_ranks(two_gpus_over_nccl, 2, tmp_path)
    assert_all_close(list(one.values()), list(other.values()), rtol=0, atol=0)
