"""What training scripts put around a layer: activation checkpointing, averaged models, SyncBatchNorm."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from ema_attention import EMAUnit


def small_unit(**options: object) -> EMAUnit:
    torch.manual_seed(2)
    return EMAUnit(6, num_bases=4, **options).double()


@pytest.mark.parametrize("gradient", ["all", "last", "none"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_moves_the_bases_once_and_changes_no_gradient(gradient: str, use_reentrant: bool) -> None:
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    results = []
    for checkpointed in (False, True):
        unit, source = small_unit(gradient=gradient), x.clone().requires_grad_()
        for _ in range(2):
            y = checkpoint(unit, source, use_reentrant=use_reentrant) if checkpointed else unit(source)
            y.pow(2).sum().backward()
        results.append([unit.mu, source.grad, *(p.grad for p in unit.parameters() if p.requires_grad)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_compiling_around_a_checkpoint_changes_no_gradient() -> None:
    x, results = torch.randn(2, 6, 5, 5, dtype=torch.float64), []
    for compiled in (False, True):
        unit, source = small_unit(gradient="all"), x.clone().requires_grad_()

        def run(x: Tensor, unit: EMAUnit = unit) -> Tensor:
            return checkpoint(unit, x, use_reentrant=False)

        run = torch.compile(run, backend="aot_eager_decomp_partition") if compiled else run
        run(source).pow(2).sum().backward()
        results.append([unit.mu, source.grad, *(p.grad for p in unit.parameters())])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_checkpointed_stack_of_units() -> None:
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64, requires_grad=True)
    mus = []
    for checkpointed in (False, True):
        model = nn.Sequential(small_unit(), small_unit(), small_unit())
        y = checkpoint_sequential(model, 2, x, use_reentrant=False) if checkpointed else model(x)
        y.sum().backward()
        mus.append([unit.mu for unit in model])
    for actual, expected in zip(*mus, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_model(use_buffers: bool) -> None:
    model = nn.Sequential(small_unit(gradient="all"))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches: list[Tensor] = [torch.randn(2, 6, 5, 5, dtype=torch.float64) for _ in range(3)]
    for x in batches:
        model(x).sum().backward()
        optimizer.step()
        averaged.update_parameters(model)
    before = averaged.module[0].mu.clone()
    update_bn(batches, averaged)
    assert not torch.equal(averaged.module[0].mu, before)  # update_bn, a pass in training mode, moves the bases too
    averaged.eval()
    assert averaged(batches[0]).isfinite().all()
    # An average of unit vectors is shorter than 1: the unit puts that right when it next moves.
    norms = averaged.module[0].mu.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_sync_batch_norm_conversion_changes_nothing_on_one_process() -> None:
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    unit = small_unit(gradient="all")
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(small_unit(gradient="all"))
    assert isinstance(converted.conv2[1], nn.SyncBatchNorm)
    assert converted.state_dict().keys() == unit.state_dict().keys()

    def passes(unit: EMAUnit) -> Iterator[Tensor]:
        yield unit.train()(x)
        yield unit.mu
        yield unit.eval()(x)

    for actual, expected in zip(passes(converted), passes(unit), strict=True):
        torch.testing.assert_close(actual, expected)
