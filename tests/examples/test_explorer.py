import io
import json
import re
from contextlib import nullcontext

import numpy as np
import pytest
import skimage.data
from PIL import Image

from ema_attention import em_stages
from examples import explorer


@pytest.fixture
def photo(tmp_path):
    """A small photograph, so that the network takes little time."""
    path = tmp_path / "photo.png"
    Image.fromarray(skimage.data.coffee()[::4, ::4]).save(path)
    return path


def read(path) -> dict:
    (content,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"))
    return json.loads(content)


def test_writes_a_page_of_several_photographs_whole_and_says_how_far_it_is(photo, tmp_path, capsys):
    upright = tmp_path / "upright.png"
    Image.fromarray(np.asarray(Image.open(photo)).transpose(1, 0, 2)).save(upright)
    output = tmp_path / "new" / "folder" / "page.html"
    options = ["--size", "96", "--bases", "3", "--together", "5", "--stages", "4", "--output", str(output)]
    explorer.main([str(photo), str(upright), *options])
    assert [path.name for path in output.parent.iterdir()] == ["page.html"]
    data = read(output)
    assert data["names"] == ["photo.png", "upright.png"]
    assert [(view["size"], view["bases"], view["stages"]) for view in data["views"]] == [
        ([1, 8, 12], 3, 4),
        ([1, 12, 8], 3, 4),
    ]
    for view in data["views"]:
        assert (np.diff(view["objective"]) >= 0).all()
    said = capsys.readouterr().out.splitlines()
    assert [line[9:] for line in said[1:4]] == [
        "1 of 2: photo.png, features at 8×12 positions",
        "2 of 2: upright.png, features at 12×8 positions",
        "5 stages of EM on all together, 4 on each",
    ]
    assert f"page: {output}, " in said[-1]


def test_one_photograph_has_all_stages_in_a_row(photo, tmp_path, capsys):
    options = ["--size", "96", "--bases", "3", "--together", "5", "--stages", "4"]
    explorer.main([str(photo), *options, "--output", str(tmp_path / "page.html")])
    assert read(tmp_path / "page.html")["views"][0]["stages"] == 9
    assert capsys.readouterr().out.splitlines()[2][9:] == "9 stages of EM"


def test_the_same_thing_in_two_images_has_the_same_number(tmp_path):
    """The same photograph mirrored: a cat's eyes and nose are one basis, in both."""
    cat = Image.fromarray(skimage.data.chelsea())
    paths = [tmp_path / "cat.png", tmp_path / "mirrored.png"]
    cat.save(paths[0])
    cat.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(paths[1])
    explorer.main([*map(str, paths), "--size", "224", "--output", str(tmp_path / "page.html")])
    left, right = (np.array(view["share"][-1]) for view in read(tmp_path / "page.html")["views"])
    assert np.abs(left - right).max() < 0.03
    assert np.ptp(left) > 0.05


def test_the_default_is_the_cat(monkeypatch):
    seen = {}

    def explore(*args, **options):
        seen.update(x=args[0], mu=args[1], **options)
        return ""

    monkeypatch.setattr(explorer, "written_whole", lambda path: seen.update(path=path) or nullcontext(io.BytesIO()))
    monkeypatch.setattr(explorer, "explore_features", explore)
    explorer.main([])
    assert str(seen["path"]) == "out/explorer.html"
    assert seen["x"][0].mean((2, 3)).norm() < 0.15  # less their mean, and then of length 1
    z = em_stages(*seen["x"], seen["mu"], seen["together"] + seen["stages"], scale=seen["scale"]).z
    assert z.shape == (15, 1, 6, 37, 56)
    left_eye, right_eye, nose = (z[-1, 0, :, y // 8, x // 8] for x, y in ((174, 117), (318, 141), (264, 243)))
    assert left_eye.argmax() == right_eye.argmax() == nose.argmax()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{tmp}/none.png"], "cannot read the image {tmp}/none.png: No such file or directory"),
        (["{photo}", "--bases", "97"], "--bases must be from 1 to 96, the number of positions; got 97"),
        (["{photo}", "--stages", "0"], "stages must be at least 1; got 0"),
        (["{photo}", "--scale", "nan"], "scale must be positive and finite; got nan"),
        (["{photo}", "--output", "{photo}/page.html"], "cannot write {photo}/page.html: "),
        (["{photo}", "--output", "{tmp}"], "cannot write {tmp}: "),
    ],
)
def test_mistakes_are_one_sentence(argv, message, photo, tmp_path, capsys):
    places = {"tmp": tmp_path, "photo": photo}
    with pytest.raises(SystemExit) as caught:
        explorer.main([*(part.format(**places) for part in argv), "--size", "96"])
    assert caught.value.code == 2
    *usage, sentence = capsys.readouterr().err.splitlines()
    assert usage[0].startswith("usage:")
    assert message.format(**places) in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]
