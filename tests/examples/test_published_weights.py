"""EMANet's published weights: their keys and shapes, the network they belong to, and conversions."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.emanet.model import emanet
from examples.emanet.published import Loaded, load_network, main, write_checkpoint
from tests.plain import PublishedEMAU

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
Shapes = dict[str, tuple[int, ...]]
Weights = dict[str, Tensor]


def norm(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for entry in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{entry}", (channels,)
    yield f"{name}.num_batches_tracked", ()


def residual_stages(depth: int, stages: tuple[str, ...], channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Bottleneck blocks: 1×1 to C/4, 3×3, 1×1 to C, and a 1×1 beside the first block of a stage."""
    for stage, name in enumerate(stages):
        width = 64 * 2**stage
        for block in range(BLOCKS[depth][stage]):
            for i, (out, size) in enumerate([(width, 1), (width, 3), (4 * width, 1)], 1):
                inputs = channels if i == 1 else width
                yield f"{name}.{block}.conv{i}.weight", (out, inputs, size, size)
                yield from norm(f"{name}.{block}.bn{i}", out)
            if block == 0:
                yield f"{name}.{block}.downsample.0.weight", (4 * width, channels, 1, 1)
                yield from norm(f"{name}.{block}.downsample.1", 4 * width)
            channels = 4 * width


def official_shapes(depth: int = 101, channels: int = 512, bases: int = 64, classes: int = 21) -> Shapes:
    return {
        "extractor.0.0.weight": (64, 3, 3, 3),
        **dict(norm("extractor.0.1", 64)),
        "extractor.0.3.weight": (64, 64, 3, 3),
        **dict(norm("extractor.0.4", 64)),
        "extractor.0.6.weight": (128, 64, 3, 3),
        **dict(norm("extractor.1", 128)),
        **dict(residual_stages(depth, ("extractor.4", "extractor.5", "extractor.6", "extractor.7"), 128)),
        "fc0.conv.weight": (channels, 2048, 3, 3),
        **dict(norm("fc0.bn", channels)),
        "emau.mu": (1, channels, bases),
        "emau.conv1.weight": (channels, channels, 1, 1),
        "emau.conv1.bias": (channels,),
        "emau.conv2.0.weight": (channels, channels, 1, 1),
        **dict(norm("emau.conv2.1", channels)),
        "fc1.0.conv.weight": (256, channels, 3, 3),
        **dict(norm("fc1.0.bn", 256)),
        "fc2.weight": (classes, 256, 1, 1),
        "fc2.bias": (classes,),
    }


def mmsegmentation_shapes(depth: int = 101, channels: int = 512, bases: int = 64, classes: int = 19) -> Shapes:
    """Of ResNetV1c, whose stem has half the official one's channels, and EMAHead with its default concat_input."""
    head = {
        "ema_in_conv.conv.weight": (channels, 2048, 3, 3),
        **dict(norm("ema_in_conv.bn", channels)),
        "ema_module.bases": (1, channels, bases),
        "ema_mid_conv.conv.weight": (channels, channels, 1, 1),
        "ema_mid_conv.conv.bias": (channels,),
        "ema_out_conv.conv.weight": (channels, channels, 1, 1),
        **dict(norm("ema_out_conv.bn", channels)),
        "bottleneck.conv.weight": (256, channels, 3, 3),
        **dict(norm("bottleneck.bn", 256)),
        "conv_cat.conv.weight": (256, 2304, 3, 3),
        **dict(norm("conv_cat.bn", 256)),
        "conv_seg.weight": (classes, 256, 1, 1),
        "conv_seg.bias": (classes,),
    }
    return {
        "backbone.stem.0.weight": (32, 3, 3, 3),
        **dict(norm("backbone.stem.1", 32)),
        "backbone.stem.3.weight": (32, 32, 3, 3),
        **dict(norm("backbone.stem.4", 32)),
        "backbone.stem.6.weight": (64, 32, 3, 3),
        **dict(norm("backbone.stem.7", 64)),
        **dict(residual_stages(depth, tuple(f"backbone.layer{i}" for i in (1, 2, 3, 4)), 64)),
        **{f"decode_head.{key}": shape for key, shape in head.items()},
    }


SHAPES = {"official": official_shapes, "mmsegmentation": mmsegmentation_shapes}


def save(weights: Weights, format: str, path: Path) -> Path:
    checkpoint = (
        {"net": weights, "step": 30000} if format == "official" else {"state_dict": weights, "meta": {"seed": 0}}
    )
    torch.save(checkpoint, path)
    return path


def numbered(shapes: Shapes) -> Weights:
    """A number for each key, in a tensor of its shape that takes no memory."""
    return {
        key: torch.tensor(i if key.endswith("tracked") else float(i)).expand(shape)
        for i, (key, shape) in enumerate(shapes.items())
    }


def drawn(shapes: Shapes) -> Weights:
    """Random weights with which no feature grows or dies, and maps are neither flat nor hard; bases shorter than 1."""

    def draw(key: str, shape: tuple[int, ...]) -> Tensor:
        if key.endswith("num_batches_tracked"):
            return torch.tensor(7)
        if key.endswith(("emau.mu", "bases")):
            return F.normalize(torch.randn(shape), dim=1) * torch.empty(shape[-1]).uniform_(0.2, 0.9)
        if len(shape) == 4:
            return torch.randn(shape) * math.sqrt(1.6 / math.prod(shape[1:]))
        if key.endswith(("running_var", "weight")):
            return torch.empty(shape).uniform_(0.5, 1.0)
        return 0.1 * torch.randn(shape)

    return {key: draw(key, shape) for key, shape in shapes.items()}


LAYOUTS = {
    "official": {
        "stem": [
            ("extractor.0.0", "extractor.0.1"),
            ("extractor.0.3", "extractor.0.4"),
            ("extractor.0.6", "extractor.1"),
        ],
        "stages": ["extractor.4", "extractor.5", "extractor.6", "extractor.7"],
        "layer4's dilations": [2, 8, 16],
        "reduction": ("fc0.conv", "fc0.bn"),
        "unit": ("emau.mu", "emau.conv1", "emau.conv2.0", "emau.conv2.1"),
        "bottleneck": ("fc1.0.conv", "fc1.0.bn"),
        "classifier": "fc2",
    },
    "mmsegmentation": {
        "stem": [(f"backbone.stem.{i}", f"backbone.stem.{i + 1}") for i in (0, 3, 6)],
        "stages": ["backbone.layer1", "backbone.layer2", "backbone.layer3", "backbone.layer4"],
        "layer4's dilations": [2, 4, 4],
        "reduction": ("decode_head.ema_in_conv.conv", "decode_head.ema_in_conv.bn"),
        "unit": (
            "decode_head.ema_module.bases",
            "decode_head.ema_mid_conv.conv",
            "decode_head.ema_out_conv.conv",
            "decode_head.ema_out_conv.bn",
        ),
        "bottleneck": ("decode_head.bottleneck.conv", "decode_head.bottleneck.bn"),
        "concatenation": ("decode_head.conv_cat.conv", "decode_head.conv_cat.bn"),
        "classifier": "decode_head.conv_seg",
    },
}


def forward(weights: Weights, format: str, image: Tensor) -> Tensor:
    """The logits of a ResNet-50 EMANet at output stride 8, by plain functions of the checkpoint's tensors."""
    layout = LAYOUTS[format]

    def conv(x: Tensor, name: str, stride: int = 1, dilation: int = 1) -> Tensor:
        weight = weights[f"{name}.weight"]
        padding = dilation * (weight.shape[-1] // 2)
        return F.conv2d(x, weight, weights.get(f"{name}.bias"), stride, padding, dilation)

    def batch_norm(x: Tensor, name: str) -> Tensor:
        entries = [weights[f"{name}.{entry}"] for entry in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *entries, eps=1e-5)

    def conv_norm_relu(x: Tensor, names: tuple[str, str], stride: int = 1, dilation: int = 1) -> Tensor:
        return batch_norm(conv(x, names[0], stride, dilation), names[1]).relu()

    x = image
    for names, stride in zip(layout["stem"], (2, 1, 1), strict=True):
        x = conv_norm_relu(x, names, stride)
    x = F.max_pool2d(x, 3, 2, 1)
    strides = (1, 2, 1, 1)
    dilations = ([1] * 3, [1] * 4, [1] + [2] * 5, layout["layer4's dilations"])
    for stage, first_stride, stage_dilations in zip(layout["stages"], strides, dilations, strict=True):
        for i, dilation in enumerate(stage_dilations):
            block, stride = f"{stage}.{i}", first_stride if i == 0 else 1
            y = conv_norm_relu(x, (f"{block}.conv1", f"{block}.bn1"))
            y = conv_norm_relu(y, (f"{block}.conv2", f"{block}.bn2"), stride, dilation)
            y = batch_norm(conv(y, f"{block}.conv3"), f"{block}.bn3")
            if i == 0:
                x = batch_norm(conv(x, f"{block}.downsample.0", stride), f"{block}.downsample.1")
            x = (x + y).relu()
    features = x

    mu, *others = layout["unit"]
    unit = PublishedEMAU(*weights[mu].shape[1:]).eval()
    parts = {f"{ours}.": f"{theirs}." for ours, theirs in zip(("conv1", "conv2.0", "conv2.1"), others, strict=True)}
    state = {
        o + key.removeprefix(t): value for o, t in parts.items() for key, value in weights.items() if key.startswith(t)
    }
    unit.load_state_dict({"mu": weights[mu], **state}, strict=True)
    x = unit.to(image.dtype)(conv_norm_relu(features, layout["reduction"]))

    x = conv_norm_relu(x, layout["bottleneck"])
    if "concatenation" in layout:
        x = conv_norm_relu(torch.cat([features, x], 1), layout["concatenation"])
    x = conv(x, layout["classifier"])
    return F.interpolate(x, size=image.shape[-2:], mode="bilinear", align_corners=True)


@pytest.mark.parametrize(
    ("format", "depth", "stem", "classes"), [("official", 101, 128, 21), ("mmsegmentation", 50, 64, 19)]
)
def test_every_published_tensor_has_its_place(format: str, depth: int, stem: int, classes: int, tmp_path: Path) -> None:
    weights = numbered(SHAPES[format](depth))
    model = load_network(save(weights, format, tmp_path / "weights.pth")).model
    state = model.state_dict()
    assert sorted(value.flatten()[0].item() for value in state.values()) == list(range(len(weights)))
    assert len(model.backbone.layer3) == BLOCKS[depth][2]
    assert model.backbone.bn1.num_features == stem
    assert (model.emau.channels, model.emau.num_bases, model.fc2.out_channels) == (512, 64, classes)
    assert (model.conv_cat is not None) == (format == "mmsegmentation")
    assert not model.training
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["emau.conv1.weight", "emau.conv1.bias"]


# 137 columns are 18 of features, in which a dilation of 16 reaches another column.
@pytest.mark.parametrize("format", SHAPES)
@torch.no_grad()
def test_the_network_computes_what_the_published_one_does(format: str, tmp_path: Path) -> None:
    weights = drawn(SHAPES[format](50, channels=64, bases=8, classes=5))
    path = save(weights, format, tmp_path / "weights.pth")
    model = load_network(path).model.double()
    path.unlink()  # 100 MB that pytest would keep
    image = torch.randn(2, 3, 17, 137, dtype=torch.float64)
    weights = {key: value.double() for key, value in weights.items()}
    logits, expected = model(image), forward(weights, format, image)
    assert logits.shape == (2, 5, 17, 137)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


def test_the_bases_are_the_files(tmp_path: Path) -> None:
    weights = numbered(official_shapes(50))
    weights["emau.mu"] = 0.5 * torch.rand(1, 512, 64)
    model = load_network(save(weights, "official", tmp_path / "weights.pth")).model
    assert torch.equal(model.emau.mu, weights["emau.mu"])


@pytest.mark.parametrize(("format", "via"), [(format, via) for format in SHAPES for via in (format, "ema-attention")])
def test_round_trips_change_no_bit(format: str, via: str, tmp_path: Path) -> None:
    weights = numbered(SHAPES[format](50))
    there, back = tmp_path / "there.pth", tmp_path / "back.pth"
    main([str(save(weights, format, tmp_path / "weights.pth")), str(there), "--to", via])
    main([str(there), str(back), "--to", format])
    entry = {"official": "net", "mmsegmentation": "state_dict"}[format]
    restored = torch.load(back, weights_only=True)[entry]
    assert restored.keys() == weights.keys()
    assert all(torch.equal(restored[key], value) for key, value in weights.items())


def test_official_weights_go_to_mmsegmentation_and_no_further(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    official = save(numbered(official_shapes(50)), "official", tmp_path / "official.pth")
    theirs = tmp_path / "theirs.pth"
    main([str(official), str(theirs), "--to", "mmsegmentation"])
    expected, state = (load_network(path).model.state_dict() for path in (official, theirs))
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    with pytest.raises(SystemExit):  # the file does not tell the multi-grid: the official code would build another
        main([str(theirs), str(tmp_path / "back.pth"), "--to", "official"])
    assert "official means multi_grid = (1, 2, 4); got None" in capsys.readouterr().err


@pytest.mark.parametrize("format", SHAPES)
def test_our_format_is_what_evaluation_and_prediction_read(format: str, tmp_path: Path) -> None:
    weights = numbered(SHAPES[format](50, channels=8, bases=4, classes=3))
    path, ours = save(weights, format, tmp_path / "weights.pth"), tmp_path / "ours.pt"
    main([str(path), str(ours), "--to", "ema-attention"])
    expected = load_network(path).model
    model = load_network(ours).model
    assert str(model) == str(expected)  # the multi-grid too
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())


def test_a_network_with_torchvisions_stem_has_its_names_in_mmsegmentation(tmp_path: Path) -> None:
    network = {"backbone": "resnet50", "num_classes": 3, "channels": 8, "num_bases": 4}
    model = emanet(**network)
    torch.save({"model": model.state_dict(), "network": network}, tmp_path / "ours.pt")
    main([str(tmp_path / "ours.pt"), str(tmp_path / "theirs.pth"), "--to", "mmsegmentation"])
    theirs = torch.load(tmp_path / "theirs.pth", weights_only=True)["state_dict"]
    backbone = {key.removeprefix("backbone."): value for key, value in theirs.items() if key.startswith("backbone.")}
    assert backbone.keys() == model.backbone.state_dict().keys()
    assert torch.equal(backbone["bn1.running_var"], model.backbone.bn1.running_var)


def test_a_checkpoint_that_does_not_say_how_its_network_is_built_is_read_from_its_weights(tmp_path: Path) -> None:
    model = emanet("resnet50", num_classes=3, channels=8, num_bases=4)
    torch.save({"model": model.state_dict(), "network": None}, tmp_path / "ours.pt")  # as fit saves it without
    found = load_network(tmp_path / "ours.pt").network
    assert (found["backbone"], found["num_classes"], found["channels"], found["num_bases"]) == ("resnet50", 3, 8, 4)


def test_a_checkpoint_may_leave_out_what_emanet_has_defaults_for(tmp_path: Path) -> None:
    with torch.device("meta"):
        expected = {key: value.shape for key, value in emanet("resnet101", channels=8).state_dict().items()}
    weights = {key: torch.zeros(shape) for key, shape in expected.items()}
    torch.save({"model": weights, "network": {"channels": 8}}, tmp_path / "ours.pt")
    loaded = load_network(tmp_path / "ours.pt")
    assert len(loaded.names) == len(loaded.colours) == 21
    write_checkpoint(loaded, tmp_path / "theirs.pth", "mmsegmentation")
    assert load_network(tmp_path / "theirs.pth").network["backbone"] == "resnet101"


@pytest.mark.parametrize("format", SHAPES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "resnet18"}, "means resnet50 or resnet101; got resnet18"),
        ({"stages": 7}, "means stages = 3; got 7"),
        ({"output_stride": 16}, "means output_stride = 8; got 16"),
    ],
)
def test_networks_that_a_format_cannot_tell_are_refused(
    format: str, change: dict, message: str, tmp_path: Path
) -> None:
    network = {"backbone": "resnet50", "num_classes": 3, **change}
    with torch.device("meta"):
        loaded = Loaded(emanet(**network), network, (), ())
    with pytest.raises(ValueError, match=f"{format} {message}"):
        write_checkpoint(loaded, tmp_path / "there.pth", format)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stem_channels": None}, "stem_channels = 128; got None"),
        ({"stem_channels": 64}, "stem_channels = 128; got 64"),
        ({"multi_grid": None}, r"multi_grid = \(1, 2, 4\); got None"),
    ],
)
def test_the_official_format_is_for_the_published_network_alone(change: dict, message: str, tmp_path: Path) -> None:
    network = {"backbone": "resnet50", "num_classes": 3, "stem_channels": 128, "multi_grid": (1, 2, 4)}
    with torch.device("meta"):
        loaded = Loaded(emanet(**(network | change)), network | change, (), ())
    with pytest.raises(ValueError, match=f"official means {message}"):
        write_checkpoint(loaded, tmp_path / "there.pth", "official")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def named(tmp_path: Path) -> Loaded:
    """A network of two classes that have names and colours."""
    path = save(numbered(official_shapes(50, channels=8, bases=4, classes=2)), "official", tmp_path / "weights.pth")
    return load_network(path)._replace(names=("road", "car"), colours=((1, 2, 3), (4, 5, 6)))


def test_names_and_colours_are_kept_in_our_format(named: Loaded, tmp_path: Path) -> None:
    write_checkpoint(named, tmp_path / "ours.pt", "ema-attention")
    again = load_network(tmp_path / "ours.pt")
    assert (again.names, again.colours) == (named.names, named.colours)


def test_classes_without_a_name_have_their_number(named: Loaded, tmp_path: Path) -> None:
    write_checkpoint(named._replace(names=("road",), colours=()), tmp_path / "ours.pt", "ema-attention")
    again = load_network(tmp_path / "ours.pt")
    assert (again.names, again.colours) == (("road", "class 1"), ((0, 0, 0), (128, 0, 0)))


@pytest.mark.parametrize(
    "change", [{"names": 3}, {"names": (1, 2)}, {"names": ("a", "b", "c")}, {"colours": ((1, 2),)}, {"colours": (3,)}]
)
def test_names_and_colours_that_are_none_are_refused(change: dict, named: Loaded, tmp_path: Path) -> None:
    write_checkpoint(named._replace(**change), tmp_path / "ours.pt", "ema-attention")
    with pytest.raises(ValueError, match=rf"ours.pt must have {next(iter(change))} of its 2 classes; got "):
        load_network(tmp_path / "ours.pt")


def test_mmsegmentations_auxiliary_head_is_dropped(tmp_path: Path) -> None:
    weights = numbered(mmsegmentation_shapes(50))
    auxiliary = {"auxiliary_head.conv_seg.bias": torch.zeros(19)}
    model = load_network(save(weights | auxiliary, "mmsegmentation", tmp_path / "weights.pth")).model
    assert len(model.state_dict()) == len(weights)


def test_files_from_before_batch_norm_counted(tmp_path: Path) -> None:
    weights = {key: value for key, value in numbered(official_shapes(50)).items() if "tracked" not in key}
    model = load_network(save(weights, "official", tmp_path / "weights.pth")).model
    assert model.fc0.bn.num_batches_tracked == 0


def checkpoint(change: Callable[[Weights], object], format: str = "official") -> dict[str, Weights]:
    weights = numbered(SHAPES[format](50))
    change(weights)
    return {"net" if format == "official" else "state_dict": weights}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "broken"),
        (b"not a checkpoint", "broken"),
        ({"net": Path("not a tensor")}, "not of tensors alone"),
        ([], "must be a checkpoint, a dict; got a list"),
        ({"weights": {}}, "an entry of net, state_dict, model; it has none"),
        ({"net": 3}, "must have a state_dict under 'net'"),
        ({"net": {"step": 3}}, "must have a state_dict under 'net'"),
        ({"state_dict": {1: torch.zeros(3)}}, "must have a state_dict under 'state_dict'"),
        ({"net": {}}, "layer3 must have one of .* blocks; got 0"),
        ({"model": {}, "network": {"depth": 50}}, "unexpected keyword argument 'depth'"),
        (checkpoint(lambda w: w.pop("emau.mu")), "emau.mu must have 3 dimensions; got"),
        (checkpoint(lambda w: w.pop("fc2.bias")), "Missing key.*fc2.bias"),
        (checkpoint(lambda w: w.update({"fc0.bn.bias": torch.zeros(3)})), "size mismatch for fc0.bn.bias"),
        (
            checkpoint(lambda w: w["fc0.bn.running_var"].fill_(torch.inf)),
            "must hold a network of finite numbers; fc0.bn.running_var has others",
        ),
        (checkpoint(lambda w: w.update({"fc9.bias": torch.zeros(3)})), "no place for 1 of its tensors, fc9.bias"),
        (
            checkpoint(lambda w: w.update({"decode_head.psp.bias": torch.zeros(3)}), "mmsegmentation"),
            "no place for 1 of its tensors, decode_head.psp.bias",
        ),
    ],
)
def test_files_that_are_no_emanets_are_named(
    content: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, target = tmp_path / "weights.pth", tmp_path / "target.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as mistake:
        load_network(path)
    assert str(path) in str(mistake.value)
    with pytest.raises(SystemExit) as stop:
        main([str(path), str(target), "--to", "ema-attention"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"{mistake.value}\n"
    assert not target.exists()


def test_what_has_no_place_in_a_format_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = {"backbone": "resnet50", "num_classes": 3, "channels": 8, "num_bases": 4, "concat_input": True}
    network |= {"stem_channels": 128, "multi_grid": (1, 2, 4)}
    path, target = tmp_path / "ours.pt", tmp_path / "target.pth"
    write_checkpoint(Loaded(emanet(**network), network, (), ()), path, "ema-attention")
    target.write_bytes(b"precious")
    with pytest.raises(SystemExit) as stop:
        main([str(path), str(target), "--to", "official"])
    assert stop.value.code == 2
    assert f"{target}: official has no place for 6 of its tensors, conv_cat.conv.weight" in capsys.readouterr().err
    assert target.read_bytes() == b"precious"


@torch.no_grad()
def test_the_deep_stem_is_timms() -> None:
    theirs = timm.create_model("resnet50s", output_stride=8).eval()
    ours = emanet("resnet50", channels=8, stem_channels=128).backbone.eval()
    weights = {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    ours.load_state_dict(weights, strict=True)
    image = torch.randn(1, 3, 33, 65)
    torch.testing.assert_close(ours(image), theirs.forward_features(image))


def test_the_backbone_has_the_papers_parameters() -> None:
    with torch.device("meta"):
        backbone = emanet("resnet101", stem_channels=128, multi_grid=(1, 2, 4)).backbone
    assert round(sum(p.numel() for p in backbone.parameters()) / 1e6, 1) == 42.6


@pytest.mark.parametrize(("output_stride", "dilations"), [(8, [2, 8, 16]), (16, [1, 4, 8])])
def test_the_multi_grid_multiplies_the_last_stages_dilations(output_stride: int, dilations: list[int]) -> None:
    with torch.device("meta"):
        plain = emanet("resnet50", output_stride=output_stride).backbone
        grid = emanet("resnet50", output_stride=output_stride, multi_grid=(1, 2, 4)).backbone
        basic = emanet("resnet18", output_stride=output_stride, multi_grid=(1, 2)).backbone
    assert [block.conv2.dilation for block in grid.layer4] == [(d, d) for d in dilations]
    assert [block.conv2.padding for block in grid.layer4] == [(d, d) for d in dilations]
    assert [conv.dilation[0] for block in basic.layer4 for conv in (block.conv1, block.conv2)] == (
        [2, 4, 8, 8] if output_stride == 8 else [1, 2, 4, 4]
    )
    plain.layer4 = grid.layer4
    assert str(plain) == str(grid)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multi_grid": (1, 2, 4)}, r"each of layer4's 2 blocks; got \(1, 2, 4\)"),
        ({"multi_grid": (0, 1)}, r"a factor of at least 1 .*; got \(0, 1\)"),
        ({"stem_channels": 128}, "stem_channels must be 64 for ResNet-18 and 34; got 128"),
        ({"stem_channels": 63}, "stem_channels must be even and at least 2; got 63"),
        ({"stem_channels": 64, "weights_backbone": "DEFAULT"}, "stem_channels must be None with .*; got 64"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        emanet("resnet18", **options)
