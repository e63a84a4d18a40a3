import pickle

import numpy as np
import pytest
import skimage.data
import torch
import torchvision
from PIL import Image

from examples import attention_maps
from examples._common import photos


@pytest.fixture
def photo(tmp_path):
    """A small photograph, so that the network takes little time."""
    path = tmp_path / "photo.png"
    Image.fromarray(skimage.data.coffee()[::4, ::4]).save(path)
    return path


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def cat_maps():
    """What the default command draws: the photograph and its maps."""
    seen = {}
    plot = attention_maps.plot_attention_maps

    def spy(image, z):
        seen.update(image=image, z=z)
        return plot(image, z)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_maps, "plot_attention_maps", spy)
        patch.setattr(attention_maps, "write_figure", lambda figure, path: seen.update(path=path))
        attention_maps.main([])
    return seen


def test_the_default_puts_the_eyes_and_the_nose_of_the_cat_into_one_small_basis(cat_maps):
    z, image = cat_maps["z"], cat_maps["image"]
    assert image.shape == (296, 448, 3)
    assert z.shape == (6, 37, 56)
    assert str(cat_maps["path"]) == "out/attention_maps.png"
    left_eye, right_eye, nose, forehead, background = (
        z[:, y // 8, x // 8] for x, y in ((174, 117), (318, 141), (264, 243), (260, 120), (430, 180))
    )
    k = int(left_eye.argmax())
    assert min(left_eye[k], right_eye[k], nose[k]) > 0.9
    assert max(forehead[k], background[k]) < 0.3
    assert z[k].mean() < 0.2


def test_the_packaged_weights_recognise_the_cat():
    """They are matched to timm's model by their order: a wrong match of equal shapes would show here."""
    model = photos.timm.create_model("tf_efficientnet_lite0")
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos.timm, "create_model", lambda *args, **kwargs: seen.append(model) or model)
        photos.efficientnet_lite0("DEFAULT")
    image = torch.from_numpy(skimage.data.chelsea()).permute(2, 0, 1)[None]
    best = seen[0]((image - 127) / 128)[0].topk(3).indices.tolist()
    assert set(best) <= {281, 282, 283, 284, 285}  # ImageNet's five domestic cats


def test_writes_the_picture_whole_and_says_where(photo, tmp_path, capsys):
    output = tmp_path / "new" / "folder" / "maps.png"
    attention_maps.main([str(photo), "--bases", "3", "--size", "96", "--output", str(output)])
    assert pixels(output).shape[1] > 500
    assert [path.name for path in output.parent.iterdir()] == ["maps.png"]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 5
    assert said[-1].endswith(f"picture: {output}")


def test_the_same_command_gives_the_same_picture(photo, tmp_path):
    outputs = [tmp_path / name for name in ("a.png", "b.png")]
    for output in outputs:
        attention_maps.main([str(photo), "--size", "96", "--output", str(output)])
    assert (pixels(outputs[0]) == pixels(outputs[1])).all()


def test_resnet50_with_weights_from_a_file(photo, tmp_path):
    torch.manual_seed(0)
    weights = tmp_path / "resnet50.pth"
    torch.save(torchvision.models.resnet50().state_dict(), weights)
    options = ["--backbone", "resnet50", "--weights", str(weights), "--size", "64", "--output", str(tmp_path / "a.png")]
    attention_maps.main([str(photo), *options])
    backbone = attention_maps.resnet50(str(weights))
    weights.unlink()  # 100 MB
    assert pixels(tmp_path / "a.png").shape[1] > 500
    x = photos.extract_features(backbone, photos.read_photo(photo, 64))
    assert x.shape == (1, 1024, 5, 8)


def test_features_are_centred_and_do_not_see_the_border():
    backbone = photos.efficientnet_lite0("DEFAULT")
    flat = np.full((64, 96, 3), 90, np.uint8)
    assert photos.extract_features(backbone, flat).shape == (1, 112, 8, 12)
    rough = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    x = photos.extract_features(backbone, rough)
    assert x.mean((2, 3)).abs().max() < 1e-4
    border = photos.extract_features(backbone, flat).norm(dim=1).max()
    assert border < 0.5 * x.norm(dim=1).mean()


def test_farthest_positions_are_the_most_different_directions():
    x = torch.tensor([[3.0, 0.0], [2.0, 0.1], [0.0, 1.0], [-1.0, 0.0]]).T.reshape(1, 2, 2, 2)
    mu = photos.farthest_positions(x, 3)
    assert mu.T.tolist() == [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]


def test_a_photograph_keeps_its_shape_and_its_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    Image.new("L", (100, 50)).save(tmp_path / "turned.jpg", exif=exif)
    assert photos.read_photo(tmp_path / "turned.jpg", 64).shape == (64, 32, 3)
    assert photos.read_photo(None, 448).shape == (296, 448, 3)


def broken_weights(path, kind):
    if kind == "text":
        path.write_text("these are no weights")
    elif kind == "code":  # a pickle that would run something
        path.write_bytes(pickle.dumps(print))
    elif kind == "list":
        torch.save([torch.zeros(3)], path)
    else:
        torch.save({"weight": torch.zeros(3)}, path)


@pytest.mark.parametrize("backbone", ["efficientnet-lite0", "resnet50"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "cannot read the checkpoint {path}: No such file or directory"),
        ("text", "cannot read the checkpoint {path}: it is broken, or not of tensors alone"),
        ("code", "cannot read the checkpoint {path}: it is broken, or not of tensors alone"),
        ("list", "{path} must be a checkpoint, a dict; got a list"),
        ("other", "{path} must hold the weights of "),
    ],
)
def test_broken_weights_are_one_sentence(backbone, kind, message, photo, tmp_path, capsys):
    path = tmp_path / "weights.pth"
    if kind != "missing":
        broken_weights(path, kind)
    assert message.format(path=path) in mistake([str(photo), "--backbone", backbone, "--weights", str(path)], capsys)


def mistake(argv, capsys) -> str:
    """The last line on stderr of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        attention_maps.main(argv)
    assert caught.value.code == 2
    *usage, sentence = capsys.readouterr().err.splitlines()
    assert usage[0].startswith("usage:")
    assert not any("Traceback" in line for line in usage)
    return sentence


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bases", "97"], "--bases must be from 1 to 96, the number of positions; got 97"),
        (["--bases", "0"], "--bases must be from 1 to 96, the number of positions; got 0"),
        (["--size", "8", "--bases", "1"], "must have positions with different features; it has one, or all are alike"),
        (["--stages", "0"], "stages must be at least 1; got 0"),
        (["--scale", "-1"], "scale must be positive and finite; got -1.0"),
        (["--size", "7"], "--size must be at least 8; got 7"),
        (["--output", "{tmp}/photo.png/maps.png"], "cannot write {tmp}/photo.png/maps.png: "),
        (["--output", "{tmp}/folder"], "cannot write {tmp}/folder: "),
        (["--output", "{tmp}/maps.xyz"], "Format 'xyz' is not supported"),
    ],
)
def test_mistakes_are_one_sentence(options, message, photo, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    options = [option.format(tmp=tmp_path) for option in options]
    assert message.format(tmp=tmp_path) in mistake([str(photo), "--size", "96", *options], capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"photo.png", "folder"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        (b"no image at all", "it is no image Pillow reads"),
        ("half", "image file is truncated"),
    ],
)
def test_a_wrong_image_is_named(content, reason, photo, tmp_path, capsys):
    path = tmp_path / "wrong.png"
    if content == "half":
        content = photo.read_bytes()[: photo.stat().st_size // 2]
    if content is not None:
        path.write_bytes(content)
    assert f"cannot read the image {path}: {reason}" in mistake([str(path)], capsys)


def test_a_download_that_fails_is_one_sentence(photo, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fail)
    sentence = mistake([str(photo), "--backbone", "resnet50", "--weights", "DEFAULT"], capsys)
    assert "cannot download the weights of resnet50: no network" in sentence
