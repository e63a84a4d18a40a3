"""EMAUnit: its formula, its state, the published names, layouts and errors."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

from ema_attention import EMAUnit, collect_attention_maps, em_attention
from tests.problems import UNIT_NORM_TOLERANCE
from tests.units import formula, trained_like


@pytest.mark.parametrize("mode", ["none", "last", "all"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("final_relu", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_unit_equals_its_formula(
    mode: str, training: bool, memory_format: torch.memory_format, masked: bool, final_relu: bool, batch: int
) -> None:
    unit = trained_like(EMAUnit(12, 5, inner_channels=10, gradient=mode, scale=1.5, final_relu=final_relu)).double()
    unit.train(training)
    x = torch.randn(batch, 12, 46, 45, dtype=torch.float64).to(memory_format=memory_format)
    mask = torch.rand(batch, 46, 45) < 0.7 if masked else None
    before = copy.deepcopy(unit)
    results = []
    for module, function in ((unit, unit), (before, partial(formula, before))):
        leaf = x.clone().requires_grad_()
        y = function(leaf, mask=mask)
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()
        parameters = [p for p in module.parameters() if p.requires_grad]
        results.append((y, torch.autograd.grad(loss, [leaf, *parameters])))
    (y, gradients), (y_formula, gradients_formula) = results
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y, y_formula)
    for one, other in zip(gradients, gradients_formula, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(unit.conv2.buffers(), before.conv2.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    if not training:
        with torch.no_grad():
            torch.testing.assert_close(unit(x, mask=mask), y_formula)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("of_input", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("of_gradient", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_a_batch_of_one_in_any_memory_format(
    hooked: bool, of_input: torch.memory_format, of_gradient: torch.memory_format
) -> None:
    unit = EMAUnit(8, 4, gradient="all", final_relu=False).double()
    if hooked:
        unit.conv2.register_forward_hook(lambda module, args, y: None)
    x, upstream = torch.randn(2, 1, 8, 3, 4, dtype=torch.float64)
    before, results = copy.deepcopy(unit), []
    for function, source, layout in ((unit, x.to(memory_format=of_input), of_gradient), (before, x, None)):
        leaf = source.clone().requires_grad_()
        y = function(leaf) if layout else formula(function, leaf)
        gradient = upstream.to(memory_format=layout or torch.contiguous_format)
        results.append(torch.autograd.grad(y, [leaf, *function.parameters()], gradient))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_a_batch_of_one_takes_no_gradient() -> None:
    class Constant(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> None:
            return None

    x = torch.randn(1, 8, 3, 4, requires_grad=True)
    (Constant.apply(EMAUnit(8, 4)(x)).sum() + x.sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_modules_in_a_unit_see_an_image(channel_dim: int) -> None:
    unit = EMAUnit(8, 4, gradient="all", norm_layer=nn.Identity, channel_dim=channel_dim).eval()
    unit.conv1 = nn.Conv2d(8, 8, 3, padding=1)
    unit.conv2[0] = nn.Conv2d(8, 8, 3, padding=1, groups=2)
    x = torch.randn(2, 8, 5, 7)
    torch.testing.assert_close(unit(x.movedim(1, channel_dim)).movedim(channel_dim, 1), formula(unit, x))


def test_published_names_and_shapes_load_strictly() -> None:
    published = {
        "mu": torch.randn(1, 512, 64),
        "conv1.weight": torch.randn(512, 512, 1, 1),
        "conv1.bias": torch.randn(512),
        "conv2.0.weight": torch.randn(512, 512, 1, 1),
        "conv2.1.weight": torch.randn(512),
        "conv2.1.bias": torch.randn(512),
        "conv2.1.running_mean": torch.randn(512),
        "conv2.1.running_var": torch.rand(512),
        "conv2.1.num_batches_tracked": torch.tensor(7),
    }
    unit = EMAUnit(512)
    assert {name: t.shape for name, t in unit.state_dict().items()} == {name: t.shape for name, t in published.items()}
    unit.load_state_dict(published, strict=True)
    for name, tensor in unit.state_dict().items():
        torch.testing.assert_close(tensor, published[name], rtol=0, atol=0)


def test_initialisation_as_published() -> None:
    unit = EMAUnit(256, 64, inner_channels=512)
    torch.testing.assert_close(unit.mu.norm(dim=1), torch.ones(1, 64))
    assert unit.mu.mean(1).abs().max() < 0.01  # drawn around 0
    assert unit.conv1.weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.02)
    assert unit.conv2[0].weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    assert unit.conv2[0].bias is None
    assert unit.conv1.bias.abs().max() <= 1 / 256**0.5
    assert (unit.conv2[1].weight == 1).all()
    assert (unit.conv2[1].bias == 0).all()


def test_training_moves_the_bases_one_step_of_the_moving_average() -> None:
    unit = EMAUnit(8, 4, decay=0.8)
    x = torch.randn(3, 8, 6, 6)
    old = unit.mu.clone()
    found = em_attention(unit.conv1(x), old, 3).mu
    unit.train()(x)
    by_hand = 0.8 * old[0] + 0.2 * (found[0] + found[1] + found[2]) / 3
    by_hand = by_hand / by_hand.pow(2).sum(0).sqrt()
    torch.testing.assert_close(unit.mu[0], by_hand)
    assert not torch.equal(unit.mu, old)


def test_eval_leaves_the_bases_bit_identical() -> None:
    unit = EMAUnit(8, 4).eval()
    old = unit.mu.clone()
    for _ in range(3):
        unit(torch.randn(2, 8, 6, 6))
    assert torch.equal(unit.mu, old)


@given(
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]), st.floats(0, 1), st.integers(0, 99)
)
def test_buffer_has_unit_norm_after_every_update(dtype: torch.dtype, decay: float, seed: int) -> None:
    torch.manual_seed(seed)
    unit = EMAUnit(6, 4, decay=decay).to(dtype).train()
    tolerance = UNIT_NORM_TOLERANCE[dtype]
    for scale in (1.0, 1e3, 0.0):
        unit((scale * torch.randn(2, 6, 5, 5)).to(dtype))
        norms = unit.mu.double().norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=tolerance)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_batch_that_is_not_finite_moves_nothing(poison: float) -> None:
    unit = EMAUnit(8, 4).train()
    old = unit.mu.clone()
    x = torch.randn(3, 8, 6, 6)
    x[1, 2, 3, 4] = poison
    unit(x)
    assert torch.equal(unit.mu, old)
    unit(torch.randn(3, 8, 6, 6))
    assert not torch.equal(unit.mu, old)


def test_copies_and_pickles_leave_a_pass_that_is_under_way_behind() -> None:
    unit = EMAUnit(8, 4)
    with collect_attention_maps(unit) as maps:
        unit(torch.randn(1, 8, 5, 5))
        copies = [copy.deepcopy(unit), pickle.loads(pickle.dumps(unit))]
        maps.clear()
        for other in copies:
            other(torch.randn(1, 8, 5, 5))
            assert other.map_collectors == []
        assert maps == {}
        unit(torch.randn(1, 8, 5, 5))


class Doubled(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return 2 * super()._conv_forward(x, weight, bias)


def test_copies_and_pickles_in_the_middle_of_a_checkpoint() -> None:
    unit = EMAUnit(8, 4)
    y = checkpoint(unit, torch.randn(1, 8, 5, 5, requires_grad=True), use_reentrant=False)
    for other in (copy.deepcopy(unit), pickle.loads(pickle.dumps(unit))):
        assert torch.equal(other.mu, unit.mu)
    y.sum().backward()


def test_copies_keep_what_is_tied() -> None:
    units = nn.ModuleList([EMAUnit(8, 4), EMAUnit(8, 4)])
    units[1].conv1, units[1].mu = units[0].conv1, units[0].mu
    units[0].pair = [units[0], units[1]]  # a plain attribute that leads back to the unit
    first, second = copy.deepcopy(units)
    assert first.conv1 is second.conv1
    assert first.mu is second.mu
    assert first.pair[0] is first
    assert first.pair[1] is second


def test_a_copy_belongs_to_the_same_process_group() -> None:
    class Group:
        def __reduce__(self) -> str:
            raise TypeError("a group cannot be copied")

    unit = EMAUnit(8, 4)
    unit.process_group = Group()
    assert copy.deepcopy(unit).process_group is unit.process_group


def test_a_unit_with_parametrized_bases_can_be_copied() -> None:
    unit = EMAUnit(8, 4).eval()
    register_parametrization(unit, "mu", nn.Tanh())
    x = torch.randn(2, 8, 3, 3)
    copied = copy.deepcopy(unit)
    assert torch.equal(copied(x), unit(x))
    assert copied.parametrizations is not unit.parametrizations


@pytest.mark.parametrize(
    "change", ["hook", "spectral norm", "wrapper", "grouped", "subclass", "method", "parametrization"]
)
def test_a_changed_conv1_is_run_as_it_is(change: str) -> None:
    unit = EMAUnit(8, 4, gradient="all").double()
    if change == "hook":
        unit.conv1.register_forward_hook(lambda module, args, y: 2 * y)
    elif change == "spectral norm":
        torch.nn.utils.spectral_norm(unit.conv1)
        unit.conv1.eval()  # else each call moves its estimate
    elif change == "grouped":
        unit.conv1 = nn.Conv2d(8, 8, 1, groups=2).double()
    elif change == "subclass":
        unit.conv1 = Doubled(8, 8, 1).double()
    elif change == "method":
        unit.conv1._conv_forward = lambda x, weight, bias: 2 * F.conv2d(x, weight, bias)
    elif change == "wrapper":
        unit.conv1 = nn.Sequential(unit.conv1, nn.Conv2d(8, 8, 1, bias=False)).double()
    else:
        torch.nn.utils.parametrizations.weight_norm(unit.conv1)
    before = copy.deepcopy(unit)
    x = torch.randn(2, 8, 10, 10, dtype=torch.float64)
    torch.testing.assert_close(unit(x), formula(before, x))
    parameters = [list(u.conv1.parameters()) for u in (unit, before)]
    before.mu.copy_(unit.mu)
    gradients = [
        torch.autograd.grad(y.square().sum(), p)
        for y, p in ((formula(before, x), parameters[1]), (unit(x), parameters[0]))
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_an_empty_batch_moves_nothing() -> None:
    unit = EMAUnit(8, 4, norm_layer=lambda channels: nn.GroupNorm(1, channels)).train()
    old = unit.mu.clone()
    assert unit(torch.randn(0, 8, 6, 6)).shape == (0, 8, 6, 6)
    assert torch.equal(unit.mu, old)


def test_bases_may_move_between_forward_and_backward() -> None:
    unit = EMAUnit(8, 4, gradient="all").train()
    x = torch.randn(2, 8, 6, 6)
    loss = unit(x).sum() + unit(x).sum()
    loss.backward()
    assert unit.conv1.weight.grad is not None


@pytest.mark.parametrize("gradient", ["all", "last", "none"])
def test_a_backward_may_need_an_evaluation_before_a_training_forward(gradient: str) -> None:
    """As a teacher and its student have: the one's forward is in eval mode, the other's moves the bases."""
    unit = EMAUnit(8, 4, stages=1, gradient=gradient, norm_layer=partial(nn.GroupNorm, 2), dtype=torch.float64)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    names = [name for name, parameter in unit.named_parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(unit.eval()(x).square().sum(), [unit.get_parameter(name) for name in names])
    loss = unit(x).square().sum()
    unit.train()(x)
    gradients = torch.autograd.grad(loss, [unit.get_parameter(name) for name in names])
    for actual, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_conv1_is_frozen_exactly_when_no_gradient_can_reach_it() -> None:
    for mode in ("none", "last", "all"):
        unit = EMAUnit(8, 4, gradient=mode).train()
        unit(torch.randn(2, 8, 6, 6)).square().sum().backward()
        for name, parameter in unit.named_parameters():
            assert parameter.requires_grad == (mode != "none" or not name.startswith("conv1"))
            assert (parameter.grad is not None) == parameter.requires_grad


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda unit: pickle.loads(pickle.dumps(unit))])
def test_copies_are_equal_and_apart(copied) -> None:
    unit = EMAUnit(8, 4)
    unit(torch.randn(2, 8, 6, 6))
    other = copied(unit)
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(other.eval()(x), unit.eval()(x), rtol=0, atol=0)
    other.train()(x)
    assert not torch.equal(other.mu, unit.mu)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda unit: pickle.loads(pickle.dumps(unit))])
def test_a_copy_of_a_compiled_unit_is_not_the_unit(copied) -> None:
    unit = EMAUnit(8, 4, gradient="all")
    unit.compile(backend="eager")
    unit(torch.randn(2, 8, 6, 6))
    mu, other = unit.mu.clone(), copied(unit)
    other(torch.randn(2, 8, 6, 6)).sum().backward()
    assert torch.equal(unit.mu, mu)
    assert not torch.equal(other.mu, mu)
    assert unit.conv1.weight.grad is None
    assert other.conv1.weight.grad is not None


def test_layouts_agree() -> None:
    """1D, 2D, 3D and tokens hold the same positions, so they give the same values."""
    unit = EMAUnit(8, 4, final_relu=False).eval()
    x = torch.randn(2, 8, 24)
    expected = unit(x)
    for shape in ((4, 6), (2, 3, 4)):
        y = unit(x.unflatten(2, shape))
        assert y.shape == (2, 8, *shape)
        torch.testing.assert_close(y.flatten(2), expected)
    for dim, tokens in ((-1, x.mT), (2, x.mT), (-1, x.unflatten(2, (4, 6)).movedim(1, -1))):
        unit.channel_dim = dim
        y = unit(tokens)
        assert y.shape == tokens.shape
        torch.testing.assert_close(y.movedim(-1, 1).flatten(2), expected)
        assert unit(tokens.contiguous()).is_contiguous()


@pytest.mark.parametrize("layer_scale", [0, 0.25, 1.0])
def test_layer_scale_is_the_weight_that_the_norm_starts_with(layer_scale: float) -> None:
    unit, published = EMAUnit(8, 4, layer_scale=layer_scale, final_relu=False).eval(), EMAUnit(8, 4, final_relu=False)
    assert torch.equal(unit.conv2[1].weight, torch.full((8,), layer_scale))
    published.load_state_dict({**unit.state_dict(), "conv2.1.weight": torch.ones(8)})
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(unit(x) - x, layer_scale * (published.eval()(x) - x))
    unit.conv2[1].weight.data.fill_(3)
    unit.reset_parameters()
    assert torch.equal(unit.conv2[1].weight, torch.full((8,), layer_scale))


def test_a_layer_scale_of_0_changes_nothing() -> None:
    x = torch.randn(2, 8, 6, 6)
    for training in (False, True):
        assert torch.equal(EMAUnit(8, 4, layer_scale=0, final_relu=False).train(training)(x), x)
        assert torch.equal(EMAUnit(8, 4, layer_scale=0).train(training)(x.relu()), x.relu())


def test_padding_does_not_leak() -> None:
    unit = EMAUnit(8, 4).eval()
    x = torch.randn(1, 8, 10)
    padded = F.pad(x, (0, 7), value=1e4)
    mask = torch.arange(17)[None] < 10
    torch.testing.assert_close(unit(padded, mask=mask)[..., :10], unit(x))


@pytest.mark.parametrize("positions", [10, 3000])
@pytest.mark.parametrize("value", [1e4, math.nan, math.inf])
def test_what_padding_holds_is_in_no_gradient(positions: int, value: float) -> None:
    unit = EMAUnit(8, 4, gradient="all", final_relu=False).double().eval()
    x = torch.randn(2, 8, positions, dtype=torch.float64)
    padded, mask = F.pad(x, (0, 7), value=value), torch.arange(positions + 7).expand(2, -1) < positions
    gradients = []
    for y in (unit(x), unit(padded, mask=mask)[..., :positions]):
        gradients.append(torch.autograd.grad(y.square().sum(), list(unit.parameters())))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("gradient", ["all", "last", "none"])
def test_what_padding_holds_is_not_seen_by_a_conv1_of_several_positions(gradient: str) -> None:
    unit = EMAUnit(8, 4).eval()
    unit.conv1 = nn.Conv2d(8, 8, 3, padding=1)
    unit.gradient = gradient  # and with it whether conv1 is frozen
    x, mask = torch.randn(1, 8, 5, 6), torch.ones(1, 5, 9, dtype=torch.bool)
    mask[..., 6:] = False
    expected, y = (unit(F.pad(x, (0, 3), value=value), mask=mask)[..., :6] for value in (0, math.nan))
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_factory_arguments_reach_every_tensor() -> None:
    unit = EMAUnit(8, 4, dtype=torch.float64, device="meta")
    assert all(t.device.type == "meta" for t in unit.state_dict().values())
    assert all(t.dtype == torch.float64 for t in unit.state_dict().values() if t.is_floating_point())


@pytest.mark.parametrize(
    "norm_layer",
    [nn.Identity, nn.InstanceNorm2d, lambda c: nn.GroupNorm(2, c), lambda c: nn.BatchNorm2d(c, affine=False)],
)
def test_other_norms_fit(norm_layer) -> None:
    unit = EMAUnit(8, 4, norm_layer=norm_layer)
    x = torch.randn(2, 8, 6, 6)
    unit.train()(x)
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(unit.eval()(x), formula(unit, x))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels must be at least 1; got 0"),
        ({"channels": 8.0}, TypeError, "channels must be an int; got float"),
        (
            {"process_group": 3},
            ValueError,
            "process_group must be a process group with this rank in it, or None; got 3",
        ),
        ({"num_bases": 0}, ValueError, "num_bases must be at least 1; got 0"),
        ({"inner_channels": 0}, ValueError, "inner_channels must be at least 1; got 0"),
        ({"stages": 0}, ValueError, "stages must be at least 1; got 0"),
        ({"stages": 2.5}, TypeError, "stages must be an int; got float"),
        ({"decay": 1.5}, ValueError, "decay must be from 0 to 1; got 1.5"),
        ({"decay": float("nan")}, ValueError, "decay must be from 0 to 1; got nan"),
        ({"dtype": torch.complex64}, TypeError, "dtype must be float16, .* or float64; got torch.complex64"),
        ({"layer_scale": -0.1}, ValueError, "layer_scale must be finite and at least 0; got -0.1"),
        ({"layer_scale": float("inf")}, ValueError, "layer_scale must be finite and at least 0; got inf"),
        ({"layer_scale": True}, TypeError, "layer_scale must be a number; got bool"),
        ({"scale": -1.0}, ValueError, "scale must be positive and finite; got -1.0"),
        ({"gradient": "some"}, ValueError, "gradient must be one of .* got 'some'"),
        ({"channel_dim": 0}, ValueError, "channel_dim must not be 0"),
        ({"channel_dim": "last"}, TypeError, "channel_dim must be an int; got str"),
        ({"norm_layer": None}, TypeError, "norm_layer must make a module from a number of channels; got NoneType"),
        ({"norm_layer": lambda c: None}, TypeError, "norm_layer must make a module .*; it made a NoneType"),
        ({"scale": torch.ones(())}, TypeError, "scale must be a number; got Tensor"),
        (
            {"layer_scale": 0, "norm_layer": nn.Identity},
            ValueError,
            "layer_scale needs a norm_layer whose weight is a parameter; got Identity",
        ),
        (
            {"layer_scale": 0, "norm_layer": lambda c: weight_norm(nn.BatchNorm2d(c), dim=None)},
            ValueError,
            "layer_scale needs a norm_layer whose weight is a parameter; got ParametrizedBatchNorm2d",
        ),
    ],
)
def test_constructor_errors(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        EMAUnit(**{"channels": 8, "num_bases": 4, **arguments})


def test_settings_are_attributes_and_in_the_repr() -> None:
    settings = {
        "num_bases": 4,
        "stages": 2,
        "inner_channels": 6,
        "decay": 0.5,
        "gradient": "last",
        "scale": 2.0,
        "layer_scale": 0.5,
        "final_relu": False,
        "channel_dim": -1,
        "sync_bases": False,
    }
    unit = EMAUnit(8, **settings)
    assert {name: getattr(unit, name) for name in settings} == settings
    assert unit.extra_repr() == ", ".join(["8", *(f"{name}={value!r}" for name, value in settings.items())])
    unit = EMAUnit(8)
    assert (unit.inner_channels, unit.sync_bases, unit.process_group) == (8, True, None)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("stages", 0, ValueError),
        ("stages", 2.0, TypeError),
        ("scale", -1.0, ValueError),
        ("scale", math.inf, ValueError),
        ("decay", 1.5, ValueError),
        ("channel_dim", "last", TypeError),
    ],
)
def test_settings_that_are_set_later_are_checked_too(name: str, value: object, error: type[Exception]) -> None:
    unit = EMAUnit(8, 4)
    setattr(unit, name, value)
    with pytest.raises(error, match=f"^{name} must be .*; got "):
        unit(torch.randn(2, 8, 5))


def test_norm_is_of_the_dtype_and_device() -> None:
    assert EMAUnit(8, 4, dtype=torch.float64).conv2[1].weight.dtype == torch.float64
    assert EMAUnit(8, 4, device="meta").conv2[1].weight.device.type == "meta"


def test_channels_in_the_batch_dimension_are_refused() -> None:
    with pytest.raises(ValueError, match="8 channels in dimension -3"):
        EMAUnit(8, 4, channel_dim=-3)(torch.randn(8, 5, 6))


@pytest.mark.parametrize("mask", [torch.ones(2, 3, 4, dtype=torch.bool), torch.ones(2, 4, 4), [True]])
def test_mask_errors(mask: Tensor) -> None:
    with pytest.raises((ValueError, TypeError), match="mask must be"):
        EMAUnit(8, 4)(torch.randn(2, 8, 4, 4), mask=mask)


def test_decay_1_leaves_bases_that_are_shorter_than_1_bit_identical() -> None:
    unit = EMAUnit(8, 4, decay=1).train()
    unit.mu.mul_(0.9)
    old = unit.mu.clone()
    unit(torch.randn(2, 8, 6, 6))
    assert torch.equal(unit.mu, old)


@pytest.mark.parametrize("shape", [(20,), (2, 3, 4)])
def test_a_norm_for_images_gets_what_is_no_image_in_one_row(shape: tuple[int, ...]) -> None:
    seen: list[torch.Size] = []
    unit = EMAUnit(8, 4, norm_layer=lambda channels: nn.GroupNorm(2, channels)).eval()
    unit.conv2[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    x = torch.randn(2, 8, *shape)
    expected = formula(unit, x.flatten(2)[:, :, None])[:, :, 0]
    seen.clear()
    torch.testing.assert_close(unit(x).flatten(2), expected)
    assert seen == [(2, 8, 1, x[0, 0].numel())]
