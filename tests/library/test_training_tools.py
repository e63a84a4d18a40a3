"""What training scripts put around a layer: activation checkpointing, averaged models, SyncBatchNorm."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

from ema_attention import EMAUnit, em_attention
from ema_attention._torch import HAS_TOP_HOOKS, saved_tensors_hooks


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


def gradients_of_two_calls(run: Callable[[EMAUnit, Tensor], Tensor], order: str, same: bool = False) -> list[Tensor]:
    """The bases, and the gradients of a loss on two calls of a unit, in one backward or in two."""
    unit = small_unit(gradient="all")
    sources = torch.randn(2, 2, 6, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    sources = [source.clone().requires_grad_() for source in (sources[:1] * 2 if same else sources)]
    losses = [i * run(unit, source).pow(2).sum() for i, source in enumerate(sources, 1)]
    for loss in {"together": [sum(losses)], "first first": losses, "last first": losses[::-1]}[order]:
        loss.backward()
    return [unit.mu, *(source.grad for source in sources), *(p.grad for p in unit.parameters())]


def nested(unit: EMAUnit, x: Tensor) -> Tensor:
    return checkpoint(lambda x: checkpoint(unit, x.sin(), use_reentrant=False).cos(), x, use_reentrant=False)


@pytest.mark.parametrize("order", ["together", "first first", "last first"])
@pytest.mark.parametrize(
    ("checkpointed", "plain"),
    [
        (partial(checkpoint, use_reentrant=False), EMAUnit.__call__),
        (partial(checkpoint, use_reentrant=True), EMAUnit.__call__),
        (nested, lambda unit, x: unit(x.sin()).cos()),
    ],
)
def test_checkpointed_calls_start_from_their_own_bases(checkpointed, plain, order: str) -> None:
    results = [gradients_of_two_calls(run, order) for run in (checkpointed, plain)]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


needs_hooks_to_tell = pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="PyTorch 2.6 does not say whether a graph is still alive"
)


@needs_hooks_to_tell
@pytest.mark.parametrize("order", ["together", "first first", "last first"])
def test_checkpointed_calls_on_the_same_input_start_from_their_own_bases(order: str) -> None:
    runs = partial(checkpoint, use_reentrant=False), EMAUnit.__call__
    results = [gradients_of_two_calls(run, order, same=True) for run in runs]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("order", ["together", "last first"])  # a reentrant one does not say which it is
def test_reentrant_calls_on_the_same_input_run_again_from_the_last(order: str) -> None:
    runs = partial(checkpoint, use_reentrant=True), EMAUnit.__call__
    results = [gradients_of_two_calls(run, order, same=True) for run in runs]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@needs_hooks_to_tell
@pytest.mark.parametrize("order", ["together", "first first", "last first"])
def test_nested_calls_on_the_same_input_start_from_their_own_bases(order: str) -> None:
    results = [gradients_of_two_calls(run, order, same=True) for run in (nested, lambda unit, x: unit(x.sin()).cos())]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@needs_hooks_to_tell
def test_calls_on_the_same_input_inside_of_reentrant_ones_are_refused() -> None:
    def mixed(unit: EMAUnit, x: Tensor) -> Tensor:
        return checkpoint(partial(checkpoint, unit, use_reentrant=False), x, use_reentrant=True)

    expected = "^a checkpoint of an EMAUnit inside of a reentrant one needs another input in each forward; got the same"
    with pytest.raises(RuntimeError, match=expected):
        gradients_of_two_calls(mixed, "together", same=True)


Checkpoint = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def frozen(unit: EMAUnit, x: Tensor, checkpointed: Checkpoint) -> Tensor:
    return checkpointed(unit, x.detach())


def offloaded(unit: EMAUnit, x: Tensor, checkpointed: Checkpoint) -> Tensor:
    def run(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return unit(x)

    return checkpointed(run, x)


def without_gradient(unit: EMAUnit, x: Tensor, checkpointed: Checkpoint) -> Tensor:
    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return unit(x)

    return checkpointed(run, x) + unit(x)


def reentrant_and_offloaded(unit: EMAUnit, x: Tensor, checkpointed: Checkpoint) -> Tensor:
    reentrant = isinstance(checkpointed, partial)
    with torch.autograd.graph.save_on_cpu():
        y = checkpoint(unit, x, use_reentrant=True) if reentrant else unit(x)
    return unit(unit(y))


@needs_hooks_to_tell
@pytest.mark.parametrize("inner", [frozen, offloaded, without_gradient, reentrant_and_offloaded])
def test_an_inner_checkpoint_that_ends_before_the_outer_one_or_after_it(
    inner: Callable[[EMAUnit, Tensor, Checkpoint], Tensor],
) -> None:
    x, results = torch.randn(2, 6, 5, 5, dtype=torch.float64), []
    for run in (partial(checkpoint, use_reentrant=False), lambda function, x: function(x)):
        unit, source = small_unit(gradient="none" if inner is frozen else "all", scale=5), x.clone().requires_grad_()
        unit.requires_grad_(inner is not frozen)
        conv = nn.Conv2d(6, 3, 1).double()
        for _ in range(2):
            run(lambda x, run=run, unit=unit, conv=conv: conv(inner(unit, x, run)).square(), source).sum().backward()
        results.append([unit.mu, conv.weight.grad] + ([] if inner is frozen else [source.grad]))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@needs_hooks_to_tell
def test_two_backwards_through_a_checkpoint_that_need_not_run_all_of_it_again() -> None:
    x, results = torch.randn(2, 6, 5, 5, dtype=torch.float64), []
    for checkpointed in (True, False):
        unit, source = small_unit(gradient="all", scale=5), x.clone().requires_grad_()

        def student(x: Tensor, unit: EMAUnit = unit) -> Tensor:
            y = unit(x)
            with torch.no_grad():
                unit(x)  # the teacher's, with which nothing is saved
            return y

        y = checkpoint(student, source, use_reentrant=False) if checkpointed else student(source)
        y.square().sum().backward(retain_graph=True)
        y.sin().sum().backward()
        results.append([unit.mu, source.grad])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@needs_hooks_to_tell
def test_a_unit_that_changes_nothing_yet_may_run_twice_in_a_checkpoint() -> None:
    x, gradients = torch.rand(2, 6, 5, 5, dtype=torch.float64), []
    for run in (lambda f, x: checkpoint(f, x, use_reentrant=False), lambda f, x: f(x)):
        unit, source = small_unit(gradient="all", layer_scale=0), x.clone().requires_grad_()
        y = run(lambda x, unit=unit: unit(unit(x)), source)
        y.pow(2).sum().backward()
        gradients.append(unit.conv2[1].weight.grad)
    assert gradients[1].abs().max() > 0.1
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_inputs_that_differ_little_are_told_apart(use_reentrant: bool) -> None:
    frames, gradients = torch.zeros(2, 2, 6, 24, 24, dtype=torch.float64), []
    for i, frame in enumerate(frames):
        frame[..., 10:13, 10 + i : 13 + i] = torch.randn(6, 3, 3, dtype=torch.float64)
    frames[:, :, 0, 0] = float("nan")  # where the mask is not
    mask = torch.ones(2, 24, 24, dtype=torch.bool)
    mask[:, 0] = False
    for checkpointed in (True, False):
        unit, sources = small_unit(gradient="all"), [frame.clone().requires_grad_() for frame in frames]
        run = partial(checkpoint, unit, use_reentrant=use_reentrant) if checkpointed else unit
        sum(i * run(source, mask)[:, :, 1:].pow(2).sum() for i, source in enumerate(sources, 1)).backward()
        gradients.append([source.grad[:, :, 1:] for source in sources])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


def bases_move_in_a_backward(before: nn.Module, x: Tensor, **options: bool) -> bool:
    unit = EMAUnit(6, 4, gradient="all", norm_layer=nn.Identity)
    model = nn.Sequential(before, unit, nn.Conv2d(6, 1, 1))  # which needs the unit's output, and so all of its forward
    y = checkpoint(model, x.requires_grad_(), **options)
    moved = unit.mu.clone()
    y.sum().backward()
    return not torch.equal(unit.mu, moved)


@needs_hooks_to_tell
def test_a_checkpoint_whose_input_is_another_one_when_it_runs_again_moves_no_bases() -> None:
    before, x, options = nn.Dropout(0.5), torch.rand(2, 6, 16, 16), {"preserve_rng_state": False}
    assert not bases_move_in_a_backward(before, x, use_reentrant=False, **options)
    expected = "^an EMAUnit in a reentrant checkpoint must get the same input when it runs again; got another one"
    with pytest.raises(RuntimeError, match=expected):
        bases_move_in_a_backward(before, x, use_reentrant=True, **options)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_of_inputs_whose_sums_overflow_moves_no_bases(use_reentrant: bool) -> None:
    x = 1e38 * torch.rand(2, 6, 16, 16)
    assert not bases_move_in_a_backward(nn.Identity(), x, use_reentrant=use_reentrant)


@pytest.mark.parametrize("saved", ["bmm", "mean", "lerp"])
def test_a_selective_checkpoint_changes_no_gradient(saved: str) -> None:
    operation = {"lerp": torch.ops.aten.lerp.Scalar, "mean": torch.ops.aten.mean.dim}
    operation = operation.get(saved) or getattr(torch.ops.aten, saved).default
    x, results = torch.randn(2, 6, 5, 5, dtype=torch.float64), []
    context = partial(create_selective_checkpoint_contexts, [operation])
    for run in (partial(checkpoint, use_reentrant=False, context_fn=context), EMAUnit.__call__):
        unit, source = small_unit(gradient="all"), x.clone().requires_grad_()
        for _ in range(2):
            run(unit, source).pow(2).sum().backward()
        results.append([unit.mu, source.grad, unit.conv1.weight.grad])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@needs_hooks_to_tell
def test_a_backward_under_saved_tensors_hooks() -> None:
    x, gradients = torch.randn(2, 6, 6, 6, dtype=torch.float64), []
    for context in (torch.autograd.graph.save_on_cpu, contextlib.nullcontext):
        unit, source = small_unit(gradient="all"), x.clone().requires_grad_()
        with context():
            (gradient,) = torch.autograd.grad(unit(source).pow(2).sum(), source, create_graph=True)
            gradient.pow(2).sum().backward()
        gradients += [gradient, source.grad]
    for actual, expected in zip(gradients[:2], gradients[2:], strict=True):
        torch.testing.assert_close(actual, expected)


@needs_hooks_to_tell
def test_second_derivatives_of_bases_that_train_under_saved_tensors_hooks() -> None:
    gradients = []
    for context in (torch.autograd.graph.save_on_cpu, contextlib.nullcontext):
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((2, 6, 36), (6, 4))]
        inputs = [inputs[0].requires_grad_(), F.normalize(inputs[1], dim=0).requires_grad_()]
        with context():
            out = em_attention(*inputs, 2).out
            first = torch.autograd.grad(out.pow(3).sum(), inputs, create_graph=True)
            second = torch.autograd.grad(sum(gradient.pow(2).sum() for gradient in first), inputs)
        gradients.append([*first, *second])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


class Offloaded(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu(), torch.autograd.graph.save_on_cpu():
            return super().forward(x)


@needs_hooks_to_tell
def test_hooks_for_saved_tensors_inside_a_checkpoint() -> None:
    x, results = torch.randn(2, 6, 5, 5, dtype=torch.float64), []
    for checkpointed in (False, True):
        unit, source = small_unit(gradient="all"), x.clone().requires_grad_()
        model = nn.Sequential(Offloaded(unit), nn.Tanh(), nn.Conv2d(6, 3, 1).double())  # which use the unit's output
        for _ in range(2):
            y = checkpoint(model, source, use_reentrant=False) if checkpointed else model(source)
            y.pow(2).sum().backward()
        results.append([unit.mu, source.grad, *(p.grad for p in model.parameters())])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(not HAS_TOP_HOOKS, reason="PyTorch 2.6 does not say whether there are hooks")
def test_hooks_for_saved_tensors_are_seen_and_left_as_they_were() -> None:
    assert saved_tensors_hooks() == []
    pairs = [(lambda t: t, lambda t: t) for _ in range(3)]
    with contextlib.ExitStack() as stack:
        for pair in pairs:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(*pair))
        assert saved_tensors_hooks() == saved_tensors_hooks() == pairs[::-1]
    assert saved_tensors_hooks() == []
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        assert saved_tensors_hooks() == []


@pytest.mark.skipif(not HAS_TOP_HOOKS, reason="PyTorch 2.6 does not say whether there are hooks")
def test_hooks_for_saved_tensors_need_not_be_functions() -> None:
    unit, x = small_unit(gradient="all"), torch.randn(2, 6, 5, 5, dtype=torch.float64, requires_grad=True)
    keep = partial(torch.add, other=0)
    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        unit(x).sum().backward()
    other, y = small_unit(gradient="all"), x.detach().clone().requires_grad_()
    other(y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_gradients_in_batches() -> None:
    unit, x = small_unit(gradient="all").eval(), torch.randn(2, 6, 6, 6, dtype=torch.float64, requires_grad=True)
    y = unit(x)
    cotangents = torch.randn(3, *y.shape, dtype=torch.float64)
    inputs = [x, *unit.parameters()]
    together = torch.autograd.grad(y, inputs, cotangents, is_grads_batched=True, retain_graph=True)
    for i, cotangent in enumerate(cotangents):
        for batched, alone in zip(together, torch.autograd.grad(y, inputs, cotangent, retain_graph=True), strict=True):
            torch.testing.assert_close(batched[i], alone)


@needs_hooks_to_tell
def test_a_forward_without_a_graph_on_the_same_input_does_not_mislead() -> None:
    x, gradients = torch.randn(2, 6, 5, 5, dtype=torch.float64), []
    for checkpointed in (True, False):
        unit, source = small_unit(gradient="all"), x.clone().requires_grad_()
        y = checkpoint(unit, source, use_reentrant=False) if checkpointed else unit(source)
        with torch.no_grad():
            unit(x)
        gradients += torch.autograd.grad(y.pow(2).sum(), source)
    torch.testing.assert_close(*gradients)


class Tagged(Tensor):
    """A tensor as frameworks have them: a subclass that says more than numbers."""


def test_a_checkpoint_takes_a_subclass_of_tensor() -> None:
    x, gradients = torch.randn(2, 6, 5, 5, dtype=torch.float64), []
    for run in (partial(checkpoint, use_reentrant=False), EMAUnit.__call__):
        unit, source = small_unit(gradient="all"), x.clone().requires_grad_()
        gradients += torch.autograd.grad(run(unit, source.as_subclass(Tagged)).pow(2).sum(), source)
    torch.testing.assert_close(*gradients)


def test_a_checkpoint_runs_again_with_plain_tensors_what_ran_with_a_subclass() -> None:
    """In the backward method of a subclass no tensor is of the subclass."""
    x, gradients = torch.randn(2, 6, 4, 4, dtype=torch.float64), []
    for run in (partial(checkpoint, use_reentrant=False), EMAUnit.__call__):
        unit, source = small_unit(gradient="all"), x.clone().requires_grad_()
        run(unit, source.as_subclass(Tagged)).pow(2).sum().backward()
        gradients.append(source.grad)
    torch.testing.assert_close(*gradients)


def test_a_checkpoint_takes_a_tensor_that_wraps_others() -> None:
    x, gradients = torch.randn(2, 6, 5, 5), []
    for run in (partial(checkpoint, use_reentrant=False), EMAUnit.__call__):
        unit, source = small_unit(gradient="all").float(), x.clone().requires_grad_()
        run(unit, TwoTensor(source, source)).pow(2).sum().backward()
        gradients += [source.grad, unit.mu]
    torch.testing.assert_close(gradients[:2], gradients[2:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("run", [partial(checkpoint, use_reentrant=False), partial(checkpoint, use_reentrant=True)])
def test_a_checkpoint_under_another_default_dtype(run: Callable[..., Tensor], dtype: torch.dtype) -> None:
    x, results = torch.randn(2, 6, 5, 5).to(dtype), []
    torch.set_default_dtype(dtype)
    try:
        for call in (run, EMAUnit.__call__):
            torch.manual_seed(0)
            unit, source = EMAUnit(6, num_bases=4, gradient="all"), x.clone().requires_grad_()
            call(unit, source).pow(2).sum().backward()
            with torch.no_grad():
                unit(x)
            results.append([source.grad, unit.mu])
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(*results)


def test_a_checkpoint_is_estimated_without_numbers() -> None:
    with FakeTensorMode():
        unit = EMAUnit(6, num_bases=4, gradient="all")
        x = torch.empty(2, 6, 5, 5, requires_grad=True)
        checkpoint(unit, x, use_reentrant=False).sum().backward()
    assert x.grad.shape == x.shape


def test_a_checkpointed_call_that_was_forgotten_is_refused() -> None:
    unit = small_unit()
    first, *others = torch.randn(66, 2, 6, 5, 5, dtype=torch.float64, requires_grad=True).unbind()
    losses = [checkpoint(unit, x, use_reentrant=True).sum() for x in (first, *others)]
    with pytest.raises(RuntimeError, match="can run its latest 64 forwards again; got the input of none of them"):
        losses[0].backward()


@needs_hooks_to_tell
def test_an_ordinary_forward_inside_a_backward_moves_the_bases() -> None:
    unit, reference = small_unit(), small_unit()
    batches = torch.randn(3, 2, 6, 5, 5, dtype=torch.float64).unbind()
    with torch.no_grad():
        for each in (unit, reference):
            for _ in range(70):
                each(batches[2])
    for x in batches:
        reference(x)
    y = checkpoint(unit, batches[0].clone().requires_grad_(), use_reentrant=False)
    unit(batches[1])
    y.register_hook(lambda grad: unit(batches[2]).detach().sum() * 0 + grad)
    y.sum().backward()
    torch.testing.assert_close(unit.mu, reference.mu)


def test_conv1_made_trainable_gets_a_gradient_of_zero_and_a_warning() -> None:
    unit, expected = small_unit().requires_grad_(True), small_unit()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    message = (
        "^EMAUnit with gradient='none' does not train conv1, which has parameters that require a gradient: set "
        r"unit\.gradient = 'all', or freeze them by unit\.conv1\.requires_grad_\(False\)$"
    )
    with pytest.warns(UserWarning, match=message) as warned:
        y = nn.ReLU(inplace=True)(unit(x))
    assert warned[0].filename == __file__
    y.pow(2).sum().backward()
    expected(x).pow(2).sum().backward()
    for (name, p), reference in zip(unit.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(p.grad, torch.zeros_like(p) if name.startswith("conv1") else reference.grad)
    assert len(warned) == 1


def test_gradient_can_be_set_later() -> None:
    unit, x = small_unit(), torch.randn(2, 6, 5, 5, dtype=torch.float64)
    unit.gradient = "all"
    unit(x).pow(2).sum().backward()
    assert unit.conv1.weight.grad.abs().sum() > 0
    unit.gradient = "none"
    assert not any(p.requires_grad for p in unit.conv1.parameters())
    with pytest.raises(ValueError, match=r"gradient must be one of .*; got 'some'"):
        unit.gradient = "some"


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
