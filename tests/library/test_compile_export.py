"""torch.compile, torch.export, ONNX and torch.func: one graph, any batch and size, the eager result."""

import io
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.func import functional_call, grad, jacrev, jvp, vmap

from ema_attention import EMAUnit, em_attention
from tests.units import trained_like

SIZES = [(2, 6, 7), (3, 9, 5), (4, 4, 11), (2, 12, 12)]


def counting_backend(graphs: list[torch.fx.GraphModule]) -> Callable[..., object]:
    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.fixture(autouse=True)
def _forget_compiled() -> None:
    torch._dynamo.reset()


def unit_and_reference(**options: object) -> tuple[EMAUnit, EMAUnit]:
    torch.manual_seed(0)
    unit = EMAUnit(8, num_bases=4, **options)
    reference = EMAUnit(8, num_bases=4, **options)
    reference.load_state_dict(unit.state_dict())
    return unit, reference


@pytest.mark.parametrize("gradient", ["all", "last", "none"])
@pytest.mark.parametrize("training", [True, False])
def test_compiles_into_one_graph_for_every_batch_and_size(training: bool, gradient: str) -> None:
    unit, reference = (u.train(training) for u in unit_and_reference(gradient=gradient))
    graphs: list[torch.fx.GraphModule] = []
    compiled = torch.compile(unit, fullgraph=True, dynamic=True, backend=counting_backend(graphs))
    for batch, height, width in SIZES:
        x = torch.randn(batch, 8, height, width)
        inputs = x.clone().requires_grad_(training), x.clone().requires_grad_(training)
        y, expected = compiled(inputs[0]), reference(inputs[1])
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(unit.mu, reference.mu, rtol=1e-4, atol=1e-5)
        if training:
            y.pow(2).sum().backward()
            expected.pow(2).sum().backward()
            torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-3, atol=1e-4)
    assert len(graphs) == 1


def test_compiles_with_a_scale_that_varies() -> None:
    x, mu = torch.randn(2, 8, 6, 7), F.normalize(torch.randn(8, 4), dim=0)
    unit, reference = (u.eval() for u in unit_and_reference())
    function = torch.compile(em_attention, fullgraph=True, dynamic=True, backend="eager")
    compiled = torch.compile(unit, fullgraph=True, dynamic=True, backend="eager")
    for scale in (1.0, 2.0, 0.5):
        torch.testing.assert_close(function(x, mu, 3, scale=scale).out, em_attention(x, mu, 3, scale=scale).out)
        unit.scale = reference.scale = scale
        torch.testing.assert_close(compiled(x), reference(x))
    with pytest.raises(ValueError, match="scale must be positive and finite; got -2"):
        em_attention(x, mu, 3, scale=-2.0)


def test_compiles_with_a_decay_that_varies() -> None:
    x = torch.randn(2, 8, 6, 7)
    unit, reference = unit_and_reference()
    compiled = torch.compile(unit, fullgraph=True, dynamic=True, backend="eager")
    for decay in (0.9, 0.5, 0.99, 1.0):
        unit.decay = reference.decay = decay
        torch.testing.assert_close(compiled(x), reference(x))
        torch.testing.assert_close(unit.mu, reference.mu)


def test_compiles_channels_last_tokens_and_masks() -> None:
    for options, x in (
        ({}, torch.randn(2, 8, 6, 7).to(memory_format=torch.channels_last)),
        ({"channel_dim": -1, "final_relu": False}, torch.randn(2, 9, 8)),
    ):
        unit, reference = (u.eval() for u in unit_and_reference(**options))
        mask = torch.rand(x.shape[0], *(x.shape[2:] if unit.channel_dim == 1 else x.shape[1:-1])) < 0.7
        compiled = torch.compile(unit, fullgraph=True, dynamic=True, backend="eager")
        torch.testing.assert_close(compiled(x, mask), reference(x, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient", ["all", "none"])
def test_trains_through_the_partitioned_graph_of_ahead_of_time_autograd(gradient: str) -> None:
    """As Inductor would: the partitioner computes some values again in backward, when the bases have moved."""
    unit, reference = unit_and_reference(gradient=gradient)
    compiled = torch.compile(unit, fullgraph=True, dynamic=True, backend="aot_eager_decomp_partition")
    buffer = unit.mu
    for i, (batch, height, width) in enumerate(SIZES):
        x = torch.randn(batch, 8, height, width)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            compiled(a).pow(2).sum().backward()
        reference(b).pow(2).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(unit.mu, reference.mu, rtol=1e-4, atol=1e-5)
    assert unit.mu is buffer  # which a state_dict, another process or a tied unit may hold
    trained = [name for name, p in unit.named_parameters() if p.requires_grad]
    for name in trained:
        actual, expected = unit.get_parameter(name).grad, reference.get_parameter(name).grad
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="PyTorch 2.6 does not say that it exports")
def test_an_exported_training_unit_moves_its_bases(strict: bool) -> None:
    unit, reference = unit_and_reference()
    x = torch.randn(2, 8, 6, 7)
    exported = torch.export.export(unit, (x,), strict=strict).module()
    for _ in range(2):
        torch.testing.assert_close(exported(x), reference(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(exported.mu, reference.mu)


@pytest.mark.filterwarnings("ignore:Skipping serialization:UserWarning")  # PyTorch 2.6's own
@torch.no_grad()
def test_the_default_compiler_infers() -> None:
    """Inductor, the whole way to machine code, once: it takes half a minute."""
    unit, reference = (u.eval() for u in unit_and_reference())
    compiled = torch.compile(unit, fullgraph=True, dynamic=True)
    for i, (batch, height, width) in enumerate(SIZES):
        x = torch.randn(batch, 8, height, width)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            y = compiled(x)
        torch.testing.assert_close(y, reference(x), rtol=1e-4, atol=1e-5)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.unit = EMAUnit(8, num_bases=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(self.conv(x))


DYNAMIC = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}


def test_exports_with_dynamic_batch_and_size() -> None:
    model = Network().eval()
    program = torch.export.export(model, (torch.randn(2, 3, 17, 19),), dynamic_shapes=(DYNAMIC,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch, height, width in [(2, 17, 19), (1, 33, 18), (5, 16, 40)]:
        x = torch.randn(batch, 3, height, width)
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the exporter's own
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_onnx_runs_any_batch_and_size() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Network().eval()
    program = torch.onnx.export(
        model, (torch.randn(2, 3, 17, 19),), dynamo=True, dynamic_shapes=(DYNAMIC,), verbose=False
    )
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for batch, height, width in [(2, 17, 19), (1, 33, 18), (5, 16, 40)]:
        x = torch.randn(batch, 3, height, width)
        (y,) = session.run(None, {name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-5, atol=1e-5)


MAPS = {}, [(2, 8, 16, 17), (1, 8, 33, 9), (5, 8, 50, 48)]
TOKENS = {"channel_dim": -1, "final_relu": False, "inner_channels": 4}, [(2, 50, 8), (1, 7, 8), (3, 2500, 8)]
CHANNELS_LAST = {"channel_dim": -1, "scale": 0.5, "gradient": "all"}, [(2, 5, 6, 8), (1, 9, 4, 8), (3, 50, 48, 8)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the exporter's own
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # checks of shapes are not part of the graph
@pytest.mark.parametrize(("options", "shapes"), [MAPS, TOKENS, CHANNELS_LAST])
@pytest.mark.parametrize(
    "opset", [13, 17, 20]
)  # the oldest that knows all the operations; the newest that this exporter knows
def test_onnx_of_a_trace_runs_any_batch_and_size(opset: int, options: dict, shapes: list[tuple[int, ...]]) -> None:
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    unit = trained_like(EMAUnit(8, num_bases=4, **options)).eval()
    channels = unit.channel_dim % len(shapes[0])
    axes = {axis: f"axis {axis}" for axis in range(len(shapes[0])) if axis != channels}
    file = io.BytesIO()
    names = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": axes, "y": axes}}
    torch.onnx.export(unit, (torch.randn(shapes[0]),), file, dynamo=False, opset_version=opset, **names)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for shape in shapes:
        x = torch.randn(shape)
        (y,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), unit(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's word on torch.jit
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("options", "shapes"), [MAPS, TOKENS, CHANNELS_LAST])
def test_a_torchscript_trace_runs_any_batch_and_size(options: dict, shapes: list[tuple[int, ...]]) -> None:
    unit = trained_like(EMAUnit(8, num_bases=4, **options)).eval()
    traced = torch.jit.trace(unit, torch.randn(shapes[0]))
    for shape in shapes:
        x = torch.randn(shape)
        torch.testing.assert_close(traced(x), unit(x), rtol=1e-5, atol=1e-5)


def test_torch_fx_takes_the_unit_for_a_leaf() -> None:
    model = Network()
    graph = fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["conv", "unit"]
    before, x = model.unit.mu.clone(), torch.randn(2, 3, 9, 8)
    graph(x)
    assert not torch.equal(model.unit.mu, before)  # it is the unit itself that runs
    torch.testing.assert_close(graph.eval()(x), model.eval()(x))


def test_torch_fx_passes_a_mask_to_the_leaf() -> None:
    class Masked(Network):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.unit(self.conv(x), mask)

    model = Masked().eval()
    x, mask = torch.randn(2, 3, 9, 9), torch.rand(2, 4, 4) < 0.5
    graph = fx.symbolic_trace(model)
    torch.testing.assert_close(graph(x, mask), model(x, mask))


def test_torchvision_extracts_features_around_a_unit() -> None:
    models = pytest.importorskip("torchvision.models")
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = models.resnet18(weights=None)
    model.layer1.append(EMAUnit(64, num_bases=4))
    extract = extraction.create_feature_extractor(model.eval(), ["layer1.2", "layer2"])
    features = extract(torch.randn(1, 3, 32, 32))
    assert [tuple(f.shape) for f in features.values()] == [(1, 64, 8, 8), (1, 128, 4, 4)]


@pytest.mark.parametrize("gradient", ["all", "last", "none"])
def test_vmap_over_samples_equals_the_batch(gradient: str) -> None:
    x, mu = torch.randn(5, 8, 6, 7), F.normalize(torch.randn(8, 4), dim=0)
    weight, bias = torch.randn(8, 8), torch.randn(8)
    mask = torch.rand(5, 6, 7) < 0.7

    def one(x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        results = em_attention(x[None], mu, 3, mask=mask[None], weight=weight, bias=bias, gradient=gradient)
        return tuple(result[0] for result in results)

    expected = em_attention(x, mu, 3, mask=mask, weight=weight, bias=bias, gradient=gradient)
    for actual, wanted in zip(vmap(one)(x, mask), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient", ["all", "last"])
def test_per_sample_gradients(gradient: str) -> None:
    x = torch.randn(4, 8, 20, dtype=torch.float64)
    parameters = {
        "mu": F.normalize(torch.randn(8, 4, dtype=torch.float64), dim=0),
        "weight": torch.randn(8, 8, dtype=torch.float64),
    }

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        mu, weight = parameters["mu"], parameters["weight"]
        return em_attention(sample[None], mu, 3, weight=weight, gradient=gradient).out.pow(2).sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for b in range(len(x)):
        leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        loss(leaves, x[b]).backward()
        for name, leaf in leaves.items():
            expected = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            torch.testing.assert_close(per_sample[name][b], expected)


@pytest.mark.parametrize("gradient", ["all", "none"])
@pytest.mark.parametrize("side", [6, 24, 48])
def test_per_sample_gradients_of_a_unit_of_any_size(side: int, gradient: str) -> None:
    unit, x = EMAUnit(8, num_bases=4, gradient=gradient).eval().double(), torch.randn(3, 8, side, side).double()
    parameters, buffers = dict(unit.named_parameters()), dict(unit.named_buffers())

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(unit, (parameters, buffers), (sample[None],)).pow(2).sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for b in range(len(x)):
        unit.zero_grad()
        unit(x[b : b + 1]).pow(2).sum().backward()
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                torch.testing.assert_close(per_sample[name][b], parameter.grad)


def test_an_ensemble_that_differs_in_one_weight() -> None:
    unit, x = EMAUnit(8, num_bases=4).eval(), torch.randn(2, 8, 48, 48)
    weights = torch.randn(3, 8, 8, 1, 1)

    def one(weight: Tensor) -> Tensor:
        return functional_call(unit, {"conv2.0.weight": weight}, (x,))

    for context in (torch.no_grad, torch.enable_grad):
        with context():
            for actual, weight in zip(vmap(one)(weights), weights, strict=True):
                torch.testing.assert_close(actual, one(weight), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # PyTorch's own decompositions
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_forward_derivatives_of_a_large_input() -> None:
    x, mu = torch.randn(1, 8, 50, 50).double(), F.normalize(torch.randn(8, 4), dim=0).double()
    direction = torch.randn_like(x)
    _, derivative = jvp(lambda x: em_attention(x, mu, 2).out, (x,), (direction,))
    step = 1e-5 * direction
    ahead, behind = em_attention(x + step, mu, 2).out, em_attention(x - step, mu, 2).out
    torch.testing.assert_close(derivative, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("gradient", ["all", "none"])
@pytest.mark.parametrize("training", [True, False])
def test_forward_derivatives_of_a_unit(training: bool, gradient: str) -> None:
    # BatchNorm's counter of batches has no forward derivative in training mode, and decay < 1 moves a buffer likewise
    norm = partial(nn.GroupNorm, 2) if training else nn.BatchNorm2d
    unit = EMAUnit(8, num_bases=4, gradient=gradient, decay=1, norm_layer=norm, final_relu=False).double()
    unit.train(training)
    x, direction = torch.randn(2, 2, 8, 48, 48).double()
    _, forward = jvp(unit, (x,), (direction,))
    upstream = torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    (backward,) = torch.autograd.grad(unit(leaf), leaf, upstream)
    torch.testing.assert_close((forward * upstream).sum(), (backward * direction).sum())


def test_jacobian() -> None:
    x, mu = torch.randn(1, 3, 5, dtype=torch.float64), F.normalize(torch.randn(3, 2, dtype=torch.float64), dim=0)

    def out(x: Tensor) -> Tensor:
        return em_attention(x, mu, 2).out

    torch.testing.assert_close(jacrev(out)(x), torch.autograd.functional.jacobian(out, x))


def test_functional_call() -> None:
    unit, other = EMAUnit(8, num_bases=4).eval(), EMAUnit(8, num_bases=4).eval()
    x = torch.randn(2, 8, 6, 7)
    torch.testing.assert_close(functional_call(unit, other.state_dict(), (x,)), other(x))
    train, moved = EMAUnit(8, num_bases=4), {name: t.clone() for name, t in other.state_dict().items()}
    before = train.mu.clone()
    functional_call(train, moved, (x,))
    assert torch.equal(train.mu, before)  # the bases that were passed moved, not the unit's own
    assert not torch.equal(moved["mu"], other.mu)


@pytest.mark.cuda
@pytest.mark.parametrize("gradient", ["all", "none"])
def test_the_default_compiler_trains_on_cuda(gradient: str) -> None:
    unit, reference = (u.cuda() for u in unit_and_reference(gradient=gradient))
    x = torch.randn(2, 8, 16, 16, device="cuda")
    y, expected = torch.compile(unit, fullgraph=True, dynamic=True)(x), reference(x)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(unit.mu, reference.mu, rtol=1e-3, atol=1e-4)
    for output in (y, expected):
        output.square().sum().backward()
    for one, other in zip(unit.parameters(), reference.parameters(), strict=True):
        if other.requires_grad:
            assert (one.grad - other.grad).norm() <= 1e-2 * other.grad.norm()
