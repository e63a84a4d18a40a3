"""EMAUnit inside networks that know nothing of it: a step of training, the weights of before, no change at first."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from ema_attention import EMAUnit, collect_attention_maps
from examples import insert_into_models
from examples.insert_into_models import INSERTIONS, PatchTokens, insert_into_vision_transformer

SMALL_INPUT = {
    "torchvision resnet18": (2, 3, 96, 64),
    "torchvision r3d_18": (2, 3, 16, 32, 32),
    "timm vit_tiny_patch16_224": (2, 3, 224, 224),
    "M5": (2, 1, 4000),
}
MAPS = {
    "torchvision resnet18": (2, 64, 6, 4),
    "torchvision r3d_18": (2, 64, 4, 4, 4),
    "timm vit_tiny_patch16_224": (2, 64, 196),
    "M5": (2, 8, 3),
}


@pytest.fixture(params=list(INSERTIONS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def with_and_without(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    build, insert, _ = INSERTIONS[name]
    original = build()
    return insert(copy.deepcopy(original)), original, torch.randn(SMALL_INPUT[name])


def unit_of(model: nn.Module) -> tuple[str, EMAUnit]:
    (found,) = ((place, module) for place, module in model.named_modules() if isinstance(module, EMAUnit))
    return found


@pytest.mark.parametrize("training", [False, True])
def test_a_fresh_unit_changes_no_output(name: str, training: bool) -> None:
    # Exactly: a norm of weight and bias 0 adds 0, and the last ReLU meets what a ReLU has made (or is not there).
    inserted, original, x = with_and_without(name)
    with torch.no_grad():
        expected = original.train(training)(x)
        assert expected.abs().max() > 0.01
        assert torch.equal(inserted.train(training)(x), expected)
        _, unit = unit_of(inserted)
        nn.init.ones_(unit.conv2[1].weight)
        assert not torch.allclose(inserted(x), expected, rtol=0.01)


def test_pretrained_weights_fit_before_and_after(name: str) -> None:
    inserted, original, _ = with_and_without(name)
    place, unit = unit_of(inserted)
    pretrained = copy.deepcopy(original.state_dict())
    for value in pretrained.values():
        value.fill_(0.5)
    original.load_state_dict(pretrained, strict=True)
    missing, unexpected = inserted.load_state_dict(pretrained, strict=False)
    assert unexpected == []
    counter = "conv2.1.num_batches_tracked"  # a BatchNorm that is missing from a checkpoint does not ask for it
    assert set(missing) == {f"{place}.{key}" for key in unit.state_dict() if key != counter}
    assert all(torch.equal(inserted.state_dict()[key], value) for key, value in pretrained.items())


def test_a_training_step_moves_the_unit_and_its_bases(name: str) -> None:
    inserted, _, x = with_and_without(name)
    _, unit = unit_of(inserted)
    first = next(inserted.parameters())
    optimizer = torch.optim.SGD([p for p in inserted.parameters() if p.requires_grad], lr=0.1)
    before = copy.deepcopy(unit.state_dict())
    with collect_attention_maps(inserted) as maps:
        loss = nn.functional.cross_entropy(inserted(x), torch.tensor([0, 1]))
    loss.backward()
    optimizer.step()
    assert [tuple(z.shape) for z in maps.values()] == [MAPS[name]]
    assert first.grad is not None
    assert first.grad.isfinite().all()
    assert first.grad.abs().max() > 0
    assert not torch.equal(unit.conv2[1].weight, before["conv2.1.weight"])
    assert not torch.equal(unit.mu, before["mu"])
    torch.testing.assert_close(unit.mu.norm(dim=1), torch.ones(1, unit.num_bases))

    before = copy.deepcopy(unit.state_dict())
    with torch.no_grad():
        inserted.eval()(x)
    assert all(torch.equal(value, before[key]) for key, value in unit.state_dict().items())


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_class_token_passes_by(prefix: int) -> None:
    unit = EMAUnit(16, num_bases=4, final_relu=False, channel_dim=-1).eval()
    tokens = torch.randn(2, prefix + 9, 16)
    with torch.no_grad():
        out = PatchTokens(unit, prefix)(tokens)
        assert torch.equal(out[:, :prefix], tokens[:, :prefix])
        torch.testing.assert_close(out[:, prefix:], unit(tokens[:, prefix:]))
    assert not torch.allclose(out[:, prefix:], tokens[:, prefix:])


def test_the_transformers_unit_sits_half_way_and_sees_no_prefix_token() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, reg_tokens=3, no_embed_class=True)
    model = insert_into_vision_transformer(model).eval()
    assert [key for key, _ in model.blocks.named_children()] == ["0", "1", "ema", "2", "3"]
    with torch.no_grad(), collect_attention_maps(model) as maps:
        model(torch.randn(1, 3, 32, 32))
    assert {key: tuple(z.shape) for key, z in maps.items()} == {"blocks.ema.module": (1, 64, 4)}


def test_the_table_has_a_row_for_every_network_and_no_change(capsys: pytest.CaptureFixture[str]) -> None:
    insert_into_models.main([])
    lines = capsys.readouterr().out.splitlines()
    rows = lines[1 : 1 + len(INSERTIONS)]
    for name, row in zip(INSERTIONS, rows, strict=True):
        assert row.startswith(name)
        *_, output, change = row.split()
        assert float(output) > 0
        assert change == "0"
