"""EMANet: its backbone's dilation, its names and costs, a training step, and the command."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import get_model

from ema_attention import EMAUnit, collect_attention_maps
from examples.emanet import forward
from examples.emanet.model import BACKBONES, ConvNormReLU, emanet, resnet_features
from tests.plain import PublishedEMAU


@pytest.mark.parametrize("name", BACKBONES)
def test_dilation_computes_what_stride_did_and_more(name: str) -> None:
    resnet = get_model(name)
    weights = resnet.state_dict()
    strided = nn.Sequential(*list(copy.deepcopy(resnet).children())[:-2]).eval()
    image = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        expected = strided(image)
        for stride in (8, 16):
            backbone = resnet_features(copy.deepcopy(resnet), stride).eval()
            features = backbone(image)
            assert features.shape == (1, expected.shape[1], 64 // stride + 1, 96 // stride + 1)
            subset = features[..., :: 32 // stride, :: 32 // stride]
            torch.testing.assert_close(subset / expected.max(), expected / expected.max(), rtol=1e-4, atol=1e-5)
            backbone.load_state_dict({k: v for k, v in weights.items() if not k.startswith("fc.")}, strict=True)


@pytest.mark.parametrize(("stride", "dilated"), [(8, [False, True, True]), (16, [False, False, True])])
def test_dilation_is_torchvisions_where_torchvision_has_it(stride: int, dilated: list[bool]) -> None:
    with torch.device("meta"):
        theirs = get_model("resnet50", replace_stride_with_dilation=dilated)
        ours = resnet_features(get_model("resnet50"), stride)

    def geometry(model: nn.Module) -> dict[str, tuple[object, ...]]:
        convs = {k: m for k, m in model.named_modules() if isinstance(m, nn.Conv2d)}
        return {k: (m.stride, m.padding, m.dilation) for k, m in convs.items()}

    assert geometry(ours) == geometry(theirs)


def test_the_heads_keys_and_shapes_are_the_published_ones() -> None:
    with torch.device("meta"):
        model = emanet("resnet101")
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    head = {k: tuple(v.shape) for k, v in model.state_dict().items() if not k.startswith("backbone.")}
    assert head.keys() == {
        "fc0.conv.weight",
        *(f"fc0.bn.{k}" for k in norm),
        "emau.mu",
        "emau.conv1.weight",
        "emau.conv1.bias",
        "emau.conv2.0.weight",
        *(f"emau.conv2.1.{k}" for k in norm),
        "fc1.0.conv.weight",
        *(f"fc1.0.bn.{k}" for k in norm),
        "fc2.weight",
        "fc2.bias",
    }
    assert head["fc0.conv.weight"] == (512, 2048, 3, 3)
    assert head["emau.mu"] == (1, 512, 64)
    assert head["emau.conv1.weight"] == head["emau.conv2.0.weight"] == (512, 512, 1, 1)
    assert head["fc1.0.conv.weight"] == (256, 512, 3, 3)
    assert head["fc2.weight"] == (21, 256, 1, 1)


# Over the backbone, for ResNet-101 at 513×513 and output stride 8: the 3×3 reduction and the unit. The paper's
# table says +43.1 G and +10.0 M for 512 channels, +21.1 G and +4.87 M for 256 (its "FLOPs" are MACs).
@pytest.mark.parametrize(
    ("channels", "published_gmac", "folded_gmac", "parameters"),
    [(512, 43.06, 42.05, 9.964e6), (256, 20.97, 20.72, 4.851e6)],
)
def test_cost_is_the_papers_and_less_when_folded(
    channels: int, published_gmac: float, folded_gmac: float, parameters: float
) -> None:
    with torch.device("meta"):
        model = emanet("resnet101", output_stride=8, channels=channels).eval()
        image = torch.empty(1, 3, 513, 513)
    over_backbone = sum(p.numel() for part in (model.fc0, model.emau) for p in part.parameters())
    assert over_backbone == pytest.approx(parameters, abs=1e3)

    macs = forward.multiply_accumulates(model, image)
    assert macs["backbone"] / 1e9 == pytest.approx(182.75, abs=0.01)
    assert (macs["fc0"] + macs["emau"]) / 1e9 == pytest.approx(folded_gmac, abs=0.01)
    positions, bases, stages = 65 * 65, 64, 3
    conv2_and_em = channels**2 * positions + (2 * stages + 1) * positions * bases * channels
    folds = 2 * stages * bases * channels * (channels + 1)  # by [weight | bias], to the bases and from the sums
    assert macs["emau"] == conv2_and_em + folds

    with torch.device("meta"):
        model.emau = PublishedEMAU(channels).eval()
    macs = forward.multiply_accumulates(model, image)
    assert macs["emau"] == conv2_and_em + channels**2 * positions
    assert (macs["fc0"] + macs["emau"]) / 1e9 == pytest.approx(published_gmac, abs=0.01)


def test_equals_the_network_with_the_unit_as_published() -> None:
    model = emanet("resnet18", channels=64, num_bases=8).eval()
    published = copy.deepcopy(model)
    published.emau = PublishedEMAU(64, 8).eval()
    published.load_state_dict(model.state_dict(), strict=True)
    image = torch.randn(2, 3, 65, 49)
    with torch.no_grad():
        torch.testing.assert_close(model(image), published(image), rtol=1e-4, atol=1e-5)


def test_upsampling_leaves_the_coarse_logits_on_every_eighth_pixel() -> None:
    model = emanet("resnet18", num_classes=5, channels=32, num_bases=8).eval()
    coarse = {}
    model.fc2.register_forward_hook(lambda module, args, output: coarse.update(logits=output))
    with torch.no_grad(), collect_attention_maps(model) as maps:
        logits = model(torch.randn(2, 3, 65, 81))
    assert coarse["logits"].shape == (2, 5, 9, 11)
    assert maps["emau"].shape == (2, 8, 9, 11)
    assert logits.shape == (2, 5, 65, 81)
    torch.testing.assert_close(logits[..., ::8, ::8], coarse["logits"])  # align_corners=True, as published
    with torch.no_grad():
        assert model(torch.randn(2, 3, 60, 83)).shape == (2, 5, 60, 83)


def test_a_training_step_moves_weights_and_bases_and_eval_moves_none() -> None:
    model = emanet("resnet18", num_classes=5, output_stride=16, channels=32, num_bases=8)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained.isdisjoint({"emau.conv1.weight", "emau.conv1.bias"})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    image, target = torch.randn(2, 3, 65, 65), torch.randint(5, (2, 65, 65))

    before = copy.deepcopy(model.state_dict())
    loss = nn.functional.cross_entropy(model(image), target)
    loss.backward()
    optimizer.step()
    still = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert still == {"emau.conv1.weight", "emau.conv1.bias"}
    torch.testing.assert_close(model.emau.mu.norm(dim=1), torch.ones(1, 8))

    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.eval()(image)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_options_reach_the_parts() -> None:
    model = emanet("resnet18", num_classes=5, channels=48, num_bases=7, stages=2)
    assert isinstance(model.emau, EMAUnit)
    assert (model.emau.channels, model.emau.num_bases, model.emau.stages) == (48, 7, 2)
    assert isinstance(model.fc1[0], ConvNormReLU)
    assert model.fc1[1].p == 0.1


def test_backbone_weights_are_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    released = get_model("resnet18").state_dict()  # in place of the download
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: released)
    model = emanet("resnet18", weights_backbone="DEFAULT")
    assert all(torch.equal(value, released[name]) for name, value in model.backbone.state_dict().items())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: emanet("resnet19"), r"backbone must be one of \('resnet18', .*; got 'resnet19'"),
        (lambda: emanet("resnet18", output_stride=4), r"output_stride must be one of \(8, 16\); got 4"),
    ],
)
def test_mistakes_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_the_command_reports_a_forward_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "photograph.png"
    Image.effect_noise((97, 65), 80).save(path)  # greyscale: colours are the command's business
    forward.main([str(path)])
    report = capsys.readouterr().out
    assert "Weights are RANDOM" in report
    for fact in ("(1, 3, 65, 97)", "(1, 21, 65, 97)", "(1, 64, 9, 13)", "42.50 M"):
        assert fact in report


@pytest.mark.parametrize("content", [None, b"not a picture", b"\x89PNG\r\n\x1a\n"])
def test_the_command_ends_with_one_sentence_for_a_bad_image(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "photograph.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as error:
        forward.main([str(path)])
    assert error.value.code == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.count("\n") == 1
    assert str(path) in streams.err
