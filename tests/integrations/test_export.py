"""Exported units in the runtimes that are too heavy for the default suite: the results of eager PyTorch to 1e-5."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from ema_attention import EMAUnit
from tests.integrations.page import EXPORT, run
from tests.units import trained_like

SIZES = {
    "maps": ({}, [(2, 8, 16, 17), (1, 8, 33, 9)]),
    "tokens": ({"channel_dim": -1, "final_relu": False, "gradient": "all"}, [(2, 50, 8), (1, 7, 8)]),
    "channels last": ({"channel_dim": -1, "inner_channels": 4, "scale": 0.5}, [(2, 5, 6, 8), (3, 7, 9, 8)]),
}


@pytest.fixture(params=list(SIZES))
def case(request: pytest.FixtureRequest) -> tuple[EMAUnit, list[Tensor]]:
    options, shapes = SIZES[request.param]
    return trained_like(EMAUnit(8, num_bases=4, **options)).eval(), [torch.randn(shape) for shape in shapes]


def export(unit: EMAUnit, x: Tensor) -> ExportedProgram:
    channels = unit.channel_dim % x.dim()
    names = {axis: Dim(f"axis{axis}", min=1, max=64) for axis in range(x.dim()) if axis != channels}
    return torch.export.export(unit, (x,), dynamic_shapes=(names,))


def assert_equal_to_eager(actual: Tensor, unit: EMAUnit, x: Tensor) -> None:
    torch.testing.assert_close(actual, unit(x).detach(), rtol=1e-5, atol=1e-5)


def test_the_page_runs_as_it_stands() -> None:
    run(EXPORT)


@pytest.mark.parametrize("source", ["module", "program"])
def test_openvino(source: str, case: tuple[EMAUnit, list[Tensor]]) -> None:
    import openvino

    unit, inputs = case
    if source == "module":
        model = openvino.convert_model(unit, example_input=inputs[0])
    else:
        model = openvino.convert_model(export(unit, inputs[0]))
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for x in inputs:
        assert_equal_to_eager(torch.from_numpy(compiled(x.numpy())[0]), unit, x)


@pytest.mark.parametrize("backend", ["portable", "xnnpack"])
def test_executorch(backend: str, case: tuple[EMAUnit, list[Tensor]]) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    unit, inputs = case
    partitioner = [XnnpackPartitioner()] if backend == "xnnpack" else []
    program = to_edge_transform_and_lower(export(unit, inputs[0]), partitioner=partitioner).to_executorch()
    method = Runtime.get().load_program(program.buffer).load_method("forward")
    for x in inputs:
        assert_equal_to_eager(method.execute([x])[0], unit, x)


def test_aot_inductor(case: tuple[EMAUnit, list[Tensor]], tmp_path: Path) -> None:
    unit, inputs = case
    with torch.no_grad():
        program = export(unit, inputs[0])
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "unit.pt2"))
        compiled = torch._inductor.aoti_load_package(package)
        for x in inputs:
            assert_equal_to_eager(compiled(x), unit, x)


@pytest.mark.parametrize("source", ["trace", "program"])
def test_coreml_converts(source: str, case: tuple[EMAUnit, list[Tensor]]) -> None:
    """The result runs on macOS alone."""
    import coremltools

    unit, (x, _) = case
    if source == "program":
        model = coremltools.convert(torch.export.export(unit, (x,)).run_decompositions({}))
    else:
        sizes = [n if n in (len(x), 8) else coremltools.RangeDim(4, 64, default=n) for n in x.shape]
        inputs = [coremltools.TensorType(name="x", shape=sizes)]
        model = coremltools.convert(torch.jit.trace(unit, x), inputs=inputs, convert_to="mlprogram")
    assert len(model.get_spec().description.output) == 1
