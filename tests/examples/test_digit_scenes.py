import re
from concurrent.futures import Future

import numpy as np
import PIL.Image
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader
from torchvision.tv_tensors import Image, Mask

from ema_attention import EMAUnit
from examples import digit_scenes
from examples.digit_scenes import SPLITS, DigitScenes, ShortSightedNet, plot_scenes

CELLS = [(slice(row, row + 16), slice(column, column + 16)) for row in range(0, 64, 16) for column in range(0, 64, 16)]


@pytest.fixture(scope="module")
def all_digits():
    """The digits as a scene shows them, by an interpolation of NumPy's, and their classes."""
    digits, classes = load_digits(return_X_y=True)
    centres = (np.arange(12) + 0.5) * 8 / 12 - 0.5  # of the pixels, in those of the 8×8 digit
    weights = np.stack([np.interp(centres, np.arange(8), one) for one in np.eye(8)], 1)  # (12, 8)
    return weights @ (digits.reshape(-1, 8, 8) / 16) @ weights.T, classes


def find_digit(cell: np.ndarray, all_digits) -> tuple[int, np.ndarray]:
    """The class of the one digit in a cell (16, 16), from 0 to 1, and the strokes (16, 16), found among all."""
    digits, classes = all_digits
    best = (np.inf, -1, (0, 0))
    for top in range(5):
        for left in range(5):
            window = cell[top : top + 12, left : left + 12]
            if np.isclose(window.sum(), cell.sum()):  # the whole digit is in it
                errors = np.abs(digits - window).max((1, 2))
                best = min(best, (errors.min(), int(errors.argmin()), (top, left)))
    error, index, (top, left) = best
    assert error < 0.01
    strokes = np.zeros((16, 16), bool)
    strokes[top : top + 12, left : left + 12] = digits[index] > 0.45
    return classes[index], strokes


@pytest.mark.parametrize("split", SPLITS)
def test_the_label_is_the_strokes_of_the_key_s_class_found_again_from_the_image(split, all_digits):
    seen = set()
    for image, label in DigitScenes(split, 30):
        assert (type(image), image.shape, image.dtype) == (Image, (3, 64, 64), torch.uint8)
        assert (type(label), label.shape, label.dtype) == (Mask, (64, 64), torch.int64)
        red, green, blue = image.numpy().astype(float)
        assert (red == green).all()
        digits = {
            number: find_digit(red[cell] / 255, all_digits) for number, cell in enumerate(CELLS) if red[cell].any()
        }
        (key,) = (number for number, cell in enumerate(CELLS) if blue[cell].min() == 160)
        assert all((blue[cell] == red[cell]).all() for number, cell in enumerate(CELLS) if number != key)
        assert len(digits) == 8
        key_class, _ = digits[key]
        for number, cell in enumerate(CELLS):
            digit_class, strokes = digits.get(number, (None, False))
            assert (label.numpy()[cell] == (strokes & (digit_class == key_class))).all()
        matches = sum(digit_class == key_class for digit_class, _ in digits.values()) - 1
        assert matches in (2, 3, 4)
        seen.add((key_class, matches))
    assert len({key_class for key_class, _ in seen}) > 5
    assert {matches for _, matches in seen} == {2, 3, 4}


def test_an_unmarked_scene_is_the_same_but_for_the_key_s_cell():
    for (image, label), (marked, same_label) in zip(DigitScenes("val", 5, False), DigitScenes("val", 5), strict=True):
        assert torch.equal(label, same_label)
        assert torch.equal(image[:2], marked[:2])
        assert torch.equal(image[2], image[0])


def test_a_scene_depends_on_the_split_and_the_index_alone():
    scenes = DigitScenes("train", 8)
    expected = [scenes[i] for i in range(8)]
    torch.manual_seed(1)
    np.random.seed(1)
    longer = DigitScenes("train", 1000)
    for i in (5, 0, 7, 5):
        for again, once in zip(longer[i], expected[i], strict=True):
            assert torch.equal(again, once)
    images = torch.cat([image for image, _ in DataLoader(scenes, 3, num_workers=2)])
    assert torch.equal(images, torch.stack([image for image, _ in expected]))
    everything = [image for split in SPLITS for image, _ in DigitScenes(split, 8)]
    assert len({image.numpy().tobytes() for image in everything}) == 24


def test_no_digit_is_in_two_splits():
    splits = [DigitScenes(split, 1) for split in SPLITS]
    assert [len(scenes.digits) for scenes in splits] == [1000, 397, 400]
    assert all(set(scenes.classes) == set(range(10)) for scenes in splits)
    _, classes = load_digits(return_X_y=True)
    every_class = np.concatenate([scenes.classes for scenes in splits])
    assert (np.bincount(every_class) == np.bincount(classes)).all()
    assert len({digit.tobytes() for scenes in splits for digit in scenes.digits}) == 1797


def test_much_of_what_is_wanted_is_farther_from_the_key_than_the_network_sees():
    beyond = wanted = 0
    for image, label in DigitScenes("train", 200):
        key = (image[2] > image[0]).nonzero()
        patches = (label == 1).nonzero() // 4 * 4  # the first pixels of the 4×4 patches; each has one set of features
        seen = (patches - 19 <= key.amax(0)) & (patches + 19 >= key.amin(0))
        beyond += (~seen.all(1)).sum().item()
        wanted += len(patches)
    assert beyond > 0.4 * wanted


def pixels_that_move(net: nn.Module, row: int, column: int) -> tuple[list[int], list[int]]:
    """The first and last row and column of an image (64, 64) that a logit's gradient reaches."""
    image = torch.rand(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    net.double().eval()(image)[0, 1, row, column].backward()
    rows, columns = image.grad[0].abs().sum(0).nonzero(as_tuple=True)
    return [int(rows.min()), int(rows.max())], [int(columns.min()), int(columns.max())]


def test_the_network_sees_39_pixels_without_a_block_and_everything_with_one():
    net = ShortSightedNet(nn.Identity)
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda module, args, out: args[0])  # a dead ReLU would hide a path
            module.inplace = False
    for row, column in ((32, 28), (35, 31), (33, 30)):  # the same 4×4 patch
        assert pixels_that_move(net, row, column) == ([13, 51], [9, 47])
    with_block = ShortSightedNet(lambda channels: EMAUnit(channels, 8, gradient="all"))
    assert pixels_that_move(with_block, 32, 28) == ([0, 63], [0, 63])


def test_the_block_gets_the_features_at_a_quarter_of_the_size():
    shapes = []
    net = ShortSightedNet(nn.Identity)
    net.block.register_forward_hook(lambda module, args, out: shapes.append(args[0].shape))
    assert net(torch.rand(2, 3, 64, 32)).shape == (2, 2, 64, 32)
    assert shapes == [(2, 48, 16, 8)]


def test_the_picture_has_a_row_for_each_of_image_label_and_prediction():
    images, labels = (torch.stack(values) for values in zip(*DigitScenes("val", 3), strict=True))
    figure = plot_scenes(images, labels)
    assert [ax.get_ylabel() for ax in figure.axes] == ["image", "", "", "label", "", ""]
    assert (figure.axes[1].images[0].get_array() == images[1].permute(1, 2, 0).numpy()).all()
    drawn = torch.from_numpy(np.array(figure.axes[4].images[0].get_array()))
    for value, colour in ((0, (0, 0, 0)), (1, (86, 180, 233))):
        assert (drawn[labels[1] == value] == torch.tensor(colour)).all()
    two = plot_scenes(images, labels, {"without": labels == 0, "with": labels == 1})
    assert [ax.get_ylabel() for ax in two.axes[::3]] == ["image", "label", "without", "with"]
    for ax, shown in ((two.axes[7], labels[1] == 0), (two.axes[10], labels[1])):
        assert (ax.images[0].get_array()[shown == 1] == (86, 180, 233)).all()
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["background", "same digit as the key"]


class AtOnce:
    """In place of another process, which would have to import all of this."""

    def __init__(self, *args) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args) -> None:
        pass

    def submit(self, function, *args) -> Future:
        future = Future()
        future.set_result(function(*args))
        return future


def test_the_example_trains_the_network_without_the_unit_and_with_it(tmp_path, capsys, monkeypatch):
    blocks = []
    monkeypatch.setattr(digit_scenes, "ProcessPoolExecutor", AtOnce)
    monkeypatch.setattr(digit_scenes, "TEST_SCENES", 3)
    monkeypatch.setattr(digit_scenes, "ShortSightedNet", lambda make: blocks.append(make(48)) or ShortSightedNet(make))
    threads = torch.get_num_threads()
    digit_scenes.main(["--steps", "2", "--output", str(tmp_path)])
    assert torch.get_num_threads() == threads
    assert [type(block) for block in blocks] == [nn.Identity, EMAUnit]
    assert (blocks[1].gradient, blocks[1].layer_scale) == ("all", 0.25)
    said = capsys.readouterr().out
    assert "on 3 scenes with digits that no network has seen:" in said
    assert re.search(r"  without the unit +\d+\.\d%\n  with the unit +\d+\.\d%\n", said)
    with PIL.Image.open(tmp_path / "run-0" / "test_scenes.png") as picture:
        assert picture.width > 500
    assert sorted(path.name for path in (tmp_path / "run-0").iterdir()) == [
        "test_scenes.png",
        "with-the-unit",
        "without-the-unit",
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("training", 5), ValueError, r"split must be one of \('train', 'val', 'test'\); got 'training'"),
        (("train", 0), ValueError, "length must be at least 1; got 0"),
        (("train", 2.0), TypeError, "length must be an int; got float"),
        (("train", True), TypeError, "length must be an int; got bool"),
    ],
)
def test_mistakes_are_one_sentence(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        DigitScenes(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", [-1, 5])
def test_an_index_beyond_the_scenes(index):
    with pytest.raises(IndexError, match=f"index must be from 0 to 4; got {index}"):
        DigitScenes("train", 5)[index]


def test_a_wrong_setting_is_found_before_anything_is_trained(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        digit_scenes.main(["--layer-scale", "-1", "--output", str(tmp_path / "out")])
    assert capsys.readouterr().err == "layer_scale must be finite and at least 0; got -1.0\n"
    assert not (tmp_path / "out").exists()
