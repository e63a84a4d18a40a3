import base64
import html
import io
import json
import re
import sys
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ema_attention import (
    EMAUnit,
    EMStages,
    collect_attention_maps,
    em_attention,
    em_stages,
    explore_attention,
    explore_features,
    explore_stages,
    model_stages,
)


def stages(*spatial: int, batch: int = 1, bases: int = 5, number: int = 4, scale: float = 4.0) -> EMStages:
    mu = F.normalize(torch.randn(6, bases), dim=0)
    return em_stages(torch.randn(batch, 6, *spatial), mu, number, scale=scale)


def read(page: str) -> dict:
    """What is in the page, the maps of each view as z (T, K, slices, rows, columns)."""
    (content,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    data = json.loads(content)
    for view in data["views"]:
        high, low = (
            np.frombuffer(zlib.decompress(base64.b64decode(view["levels"])), np.uint8).reshape(2, -1).astype(int)
        )
        levels = (256 * high + low).reshape(view["stages"], view["bases"], *view["size"]).cumsum(0) % 4096
        view["z"] = torch.from_numpy(levels / 4095 * np.array(view["peak"])[:, None, None, None]).float()
    return data


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,")))))


def test_the_maps_are_those_of_the_units_to_a_level():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), EMAUnit(8, 4, stages=5, scale=2), nn.Conv2d(8, 6, 3, 2), EMAUnit(6, 7))
    photos = torch.rand(2, 3, 24, 32)
    data = read(explore_attention(model, photos, photos, names=["a", "b"]))
    with torch.no_grad(), collect_attention_maps(model.eval()) as maps:
        model(photos)
    seen = [(view["image"], view["unit"], view["stages"]) for view in data["views"]]
    assert seen == [(0, "1", 5), (0, "3", 3), (1, "1", 5), (1, "3", 3)]
    for view in data["views"]:
        z = maps[view["unit"]][view["image"]]
        tolerance = z.new_tensor(view["peak"])[:, None, None] / 8189 + 1e-5  # the unit may run in another form
        assert ((view["z"][-1, :, 0] - z).abs() <= tolerance).all()
        torch.testing.assert_close(torch.tensor(view["share"][-1]), z.mean((1, 2)), rtol=0, atol=1e-6)


def test_every_stage_is_there_with_its_objective():
    expected = stages(6, 9)
    (view,) = read(explore_stages(expected, torch.rand(1, 3, 12, 18)))["views"]
    torch.testing.assert_close(view["z"][:, :, 0], expected.z[:, 0], rtol=0, atol=1 / 8189)
    assert view["objective"] == expected.objective[:, 0].tolist()


def test_the_strongest_positions_lie_apart_and_the_first_is_the_largest():
    z = torch.zeros(1, 1, 2, 8, 16)
    z[..., 0, 2, 3], z[..., 0, 2, 4], z[..., 0, 6, 12], z[..., 0, 7, 0] = 1.0, 0.9, 0.8, 0.3
    z[:, :, 1] = 1 - z[:, :, 0]
    z[..., 1, :, :4] = 0
    (view,) = read(explore_stages(EMStages(z, torch.zeros(2, 1)), [torch.rand(1, 16, 32)]))["views"]
    first, second = view["strongest"][0]
    assert [divmod(n, 16) for n in first] == [(2, 3), (6, 12)]
    assert len(second) == 5


@pytest.mark.parametrize("bases", [6, 64])
@pytest.mark.parametrize("spatial", [(45, 60), (90, 120), (360, 480)])
def test_a_photograph_takes_at_most_3_mb(spatial, bases):
    """Random features are the worst there is: no two neighbours, and no two stages, are alike."""
    page = explore_stages(stages(*spatial, bases=bases, number=3, scale=6.0), torch.rand(1, 3, 360, 480))
    assert len(page.encode()) <= 3e6


def test_more_positions_than_a_page_shows_are_averaged():
    z, _ = expected = stages(150, 130, number=2)  # 19,500 positions
    (view,) = read(explore_stages(expected, torch.rand(1, 3, 30, 26)))["views"]
    assert view["block"] == 2
    assert view["size"] == [1, 75, 65]
    blocks = z[:, 0].unflatten(3, (65, 2)).unflatten(2, (75, 2)).mean((3, 5))
    torch.testing.assert_close(view["z"][:, :, 0], blocks, rtol=0, atol=1 / 8189)
    torch.testing.assert_close(torch.tensor(view["share"]), z[:, 0].mean((2, 3)), rtol=0, atol=1e-6)
    long = read(explore_stages(stages(40_000, number=1), torch.rand(1, 40_000)))["views"][0]
    assert (long["block"], long["size"]) == (4, [1, 1, 10_000])


@pytest.mark.parametrize(("spatial", "image"), [((10_001,), (1, 9)), ((101, 101), (1, 9, 9))])
def test_blocks_that_do_not_divide_the_size_are_alike_from_either_end(spatial, image):
    """The page draws all of them equally wide, so that none may be of fewer positions than its place has."""
    z = torch.rand(1, 1, 1, *spatial)
    there, back = (
        read(explore_stages(EMStages(maps, torch.zeros(2, 1)), [torch.rand(image)]))["views"][0]
        for maps in (z, z.flip(-1))
    )
    assert spatial[-1] % there["size"][2]
    torch.testing.assert_close(there["z"], back["z"].flip(-1), rtol=0, atol=1 / 4000)


def test_slices_are_not_averaged():
    (view,) = read(explore_stages(stages(11_000, 1, 1, bases=2, number=1), [torch.rand(1, 11_000, 1, 1)]))["views"]
    assert view["size"] == [11_000, 1, 1]


def test_it_is_one_file_that_loads_nothing():
    page = explore_stages(stages(4, 5), torch.rand(1, 3, 8, 10))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    assert policy in page
    urls = set(re.findall(r"https?://[^\"' ]+", page))
    assert urls == {"http://www.w3.org/2000/svg"}  # a name, not a place
    assert "{{" not in page


def test_the_photograph_is_in_it_and_a_large_one_is_shrunk():
    array = np.zeros((40, 60, 3), np.uint8)
    array[:, 30:] = 200, 100, 50
    for image, size in ((array, (40, 60, 3)), (np.repeat(np.repeat(array, 20, 0), 20, 1), (427, 640, 3))):
        (picture,) = read(explore_stages(stages(4, 6), [image]))["pictures"]
        shown = pixels(*picture["frames"])
        assert shown.shape == size
        assert np.abs(shown[:, -8:].astype(int) - (200, 100, 50)).max() < 6


def test_names_may_hold_anything():
    name = '</script><img src=x> "&'
    page = explore_stages(stages(4, 5), torch.rand(1, 3, 8, 10), names=[name])
    assert read(page)["names"] == [name]
    assert page.count("</script>") == 2


def test_images_of_several_sizes_are_several_batches():
    sizes = [(16, 24), (20, 12)]
    unit = nn.Sequential(nn.Conv2d(3, 6, 2, 2), EMAUnit(6, 3))
    photos = [torch.rand(1, 3, *size) for size in sizes]
    page = explore_attention(unit, photos, [photo[0] for photo in photos])
    assert [view["size"] for view in read(page)["views"]] == [[1, 8, 12], [1, 10, 6]]


def test_a_signal_is_a_line_for_each_channel():
    z, _ = expected = stages(9)
    data = read(explore_stages(expected, [torch.tensor([[0.0, 1.0, 3.0], [4.0, 2.0, 0.0]])]))
    assert data["pictures"] == [{"lines": [[0, 0.25, 0.75], [1, 0.5, 0]]}]
    (view,) = data["views"]
    assert view["size"] == [1, 1, 9]
    torch.testing.assert_close(view["z"][:, :, 0, 0], z[:, 0], rtol=0, atol=1 / 8189)


def test_a_signal_of_any_range_and_byte_order():
    for signal in (torch.tensor([[-3e38, 0, 3e38]]), np.array([[-2, 0, 2]], ">i2")):
        assert read(explore_stages(stages(3), [signal]))["pictures"] == [{"lines": [[0, 0.5, 1]]}]
    with pytest.raises(TypeError, match=r"an image must be of real numbers; got .*complex64"):
        explore_stages(stages(3), [torch.ones(3, dtype=torch.complex64)])


def test_a_long_signal_keeps_its_extremes():
    signal = torch.zeros(5000)
    signal[3210], signal[77] = 5, -3
    (line,) = read(explore_stages(stages(9), [signal]))["pictures"][0]["lines"]
    assert len(line) == 1000
    assert (min(line), max(line)) == (0, 1)


def test_a_volume_is_a_photograph_for_each_slice():
    z, _ = expected = stages(2, 3, 4)
    volume = torch.linspace(0, 1, 6).view(6, 1, 1).expand(6, 12, 16)
    for image in (volume, volume[None], volume.expand(3, 6, 12, 16)):
        data = read(explore_stages(expected, [image]))
        frames = [pixels(frame).mean() / 255 for frame in data["pictures"][0]["frames"]]
        assert frames == pytest.approx([0.2, 0.8], abs=0.01)
    (view,) = data["views"]
    assert view["size"] == [2, 3, 4]
    torch.testing.assert_close(view["z"], z[:, 0], rtol=0, atol=1 / 8189)


def test_tokens_of_a_photograph_are_laid_out_on_a_grid():
    unit = EMAUnit(6, 4, channel_dim=-1)
    tokens = torch.randn(1, 1 + 3 * 5, 6)
    photo = [torch.rand(3, 12, 20)]
    (view,) = read(explore_attention(unit, tokens, photo, grid=(3, 5)))["views"]
    with torch.no_grad(), collect_attention_maps(unit.eval()) as maps:
        unit(tokens)
    torch.testing.assert_close(view["z"][-1, :, 0], maps[""][0, :, 1:].view(4, 3, 5), rtol=0, atol=1 / 8189)
    with pytest.raises(ValueError, match=r"grid must be of at most the 16 tokens of ''; got \(3, 6\)"):
        explore_attention(unit, tokens, photo, grid=(3, 6))
    for grid in ((-3, -5), (3.0, 5), (3, 5, 1), 15):
        with pytest.raises(ValueError, match="grid must be .* two positive integers; got " + re.escape(repr(grid))):
            explore_attention(unit, tokens, photo, grid=grid)


@pytest.mark.parametrize(
    ("spatial", "images", "message"),
    [
        ((4, 5), torch.rand(2, 3, 8, 10), "as many as the samples, 1; got 2 images and 2 names"),
        ((4, 5), [torch.rand(8, 10)], r"image must be a tensor \(3, H, W\) .* got Tensor \(8, 10\)"),
        ((9,), [torch.rand(3, 8, 10)], r"image 0 must be a finite signal .* grid of the tokens .*; got \(3, 8, 10\)"),
        ((9,), [torch.full((9,), torch.nan)], r"image 0 must be a finite signal .*; got \(9,\)"),
        ((2, 3, 4), [torch.rand(2, 5, 8, 10)], r"image 0 must be a volume .*; got \(2, 5, 8, 10\)"),
        ((2, 2, 3, 4), [torch.rand(8, 10)], "the maps of image 0 must have one to three spatial dimensions; got 4"),
    ],
)
def test_images_that_do_not_fit_are_refused_in_one_sentence(spatial, images, message):
    with pytest.raises(ValueError, match=message) as caught:
        explore_stages(stages(*spatial), images)
    assert "\n" not in str(caught.value)


def test_maps_that_are_not_finite_are_named():
    x = torch.randn(2, 3, 8, 10)
    x[1, 0, 0, 0] = torch.inf
    model = nn.Sequential(nn.Conv2d(3, 6, 1), EMAUnit(6, 4))
    with pytest.raises(ValueError, match="the maps of '1' over right must have values from 0 to 1; got nan to nan"):
        explore_attention(model, x, torch.rand(2, 3, 8, 10), names=["left", "right"])


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_an_objective_that_is_not_finite_is_named(value):
    z, objective = stages(4, 5)
    objective[2] = value
    with pytest.raises(ValueError, match=rf"the objective of cat must be finite; got \[.*{value}.*\]"):
        explore_stages(EMStages(z, objective), torch.rand(1, 3, 8, 10), names=["cat"])


def starts(page: str) -> torch.Tensor:
    """The maps of the first stage of each view."""
    return torch.stack([view["z"][0, :, 0] for view in read(page)["views"]])


def test_features_of_several_images_start_from_em_on_all_of_their_positions():
    x = F.normalize(torch.randn(2, 6, 4, 5), dim=1)
    mu = F.normalize(torch.randn(6, 3), dim=0)
    images = torch.rand(2, 3, 8, 10)
    side_by_side = x.movedim(0, 2).flatten(2, 3)[None]  # (1, 6, 2 · 4, 5)
    start = em_attention(side_by_side, mu, 7, scale=9.0).mu
    expected = em_stages(x, start, 2, scale=9.0)
    for features in (x, [x[:1], x[1:]]):
        data = read(explore_features(features, mu, images, stages=2, together=7, scale=9.0))
        for b, view in enumerate(data["views"]):
            torch.testing.assert_close(view["z"][:, :, 0], expected.z[:, b], rtol=0, atol=1e-3)
            assert view["objective"] == pytest.approx(expected.objective[:, b].tolist(), rel=1e-5)
    own = em_stages(x, mu, 1, scale=9.0).z[0]
    torch.testing.assert_close(starts(explore_features(x, mu, images, together=0, scale=9.0)), own, rtol=0, atol=1e-3)


def test_of_one_image_alone_all_stages_are_shown():
    x, mu = torch.randn(1, 6, 4, 5), F.normalize(torch.randn(6, 3), dim=0)
    photo = torch.rand(1, 3, 8, 10)
    page = explore_features(x, mu, photo, stages=2, together=3)
    assert page == explore_stages(em_stages(x, mu, 5), photo)


class InPlace(nn.Module):
    """A model that overwrites what its unit has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.unit = nn.Conv2d(3, 6, 2, 2), EMAUnit(6, 4, scale=30.0)

    def forward(self, photos: torch.Tensor) -> torch.Tensor:
        x = self.conv(photos)
        y = self.unit(x)
        x.zero_()
        return y


def test_a_common_start_in_place_of_the_units_own():
    model = InPlace()
    photos = torch.rand(1, 3, 24, 30), torch.rand(1, 3, 6, 8)  # in so many positions conv1 would be folded
    images = [photo[0] for photo in photos]
    page = explore_attention(model, photos, images, together=5)
    features = [model.conv(photo).detach() for photo in photos]
    projection = {"weight": model.unit.conv1.weight.detach().flatten(1), "bias": model.unit.conv1.bias.detach()}
    side_by_side = torch.cat([x.flatten(2) for x in features], 2)
    start = em_attention(side_by_side, model.unit.mu, 5, scale=30.0, **projection).mu
    expected = [em_stages(x, start, 3, scale=30.0, **projection).z[:, 0] for x in features]
    assert expected[0].std(1).mean() > 0.1
    for view in read(page)["views"]:
        torch.testing.assert_close(view["z"][:, :, 0], expected[view["image"]], rtol=0, atol=1e-3)
    own = model_stages(model, photos[0])["unit"].z[0]
    torch.testing.assert_close(starts(explore_attention(model, photos[0], images[:1])), own, rtol=0, atol=1e-3)
    assert not own.allclose(expected[0][0], atol=0.05)


@pytest.mark.parametrize("together", [-1, 2.0, True, None])
def test_stages_together_are_a_number_of_stages(together):
    x, photos = torch.randn(2, 3, 4, 5), torch.rand(2, 3, 8, 10)
    for explore in (
        lambda: explore_features(x, torch.randn(3, 2), photos, together=together),
        lambda: explore_attention(EMAUnit(3, 2), x, photos, together=together),
    ):
        error, message = (ValueError, "at least 0; got -1") if together == -1 else (TypeError, "an int; got ")
        with pytest.raises(error, match=f"together must be {message}"):
            explore()


@pytest.mark.parametrize(
    ("x", "mu", "message"),
    [
        (
            torch.randn(2, 3, 4, 5),
            torch.randn(2, 3, 2),
            r"mu must be \(C, K\), the start of every sample; got \(2, 3, 2\)",
        ),
        ([], torch.randn(3, 2), "x must be features of one sample or more; got none"),
        (torch.randn(2, 4, 4, 5), torch.randn(3, 2), r"mu must be"),
    ],
)
def test_features_that_do_not_fit_are_refused(x, mu, message):
    with pytest.raises(ValueError, match=message):
        explore_features(x, mu, torch.rand(2, 3, 8, 10))


def test_a_page_is_a_string_that_saves_and_shows_itself(tmp_path):
    page = explore_stages(GOOD, torch.rand(1, 3, 8, 10), names=["Straße"])
    assert isinstance(page, str)
    assert type(str(page)) is str
    assert str(page).startswith("<!doctype html>")
    assert repr(page) == "<the explorer's page, 0.0 MB>"
    page.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text("utf-8") == page
    frame = page._repr_html_()
    assert frame.startswith("<iframe srcdoc=")
    assert re.findall(r"<[/\w]+", frame) == ["<iframe", "</iframe"]
    assert html.unescape(re.search(r'srcdoc="([^"]*)"', frame)[1]) == page


GOOD = stages(4, 5)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (em_attention(torch.randn(1, 6, 4, 5), torch.randn(6, 3), 2), TypeError, "stages must be .*; got Tensor"),
        (tuple(GOOD), TypeError, "stages must be EMStages, .*; got Tensor"),
        ({"1": GOOD.z[-1]}, TypeError, "stages of '1' must be EMStages, .*; got Tensor"),
        (3, TypeError, "stages must be EMStages, .*; got int"),
        (EMStages(GOOD.z.numpy(), GOOD.objective), TypeError, "stages must be tensors; got ndarray"),
        ([], ValueError, "stages must be of one sample or more; got none"),
        ({}, ValueError, "stages must be of one sample or more; got none"),
        (EMStages(GOOD.z[:, :0], GOOD.objective[:, :0]), ValueError, r"no dimension of 0; got \(4, 0, 5, 4, 5\)"),
        (EMStages(GOOD.z, GOOD.objective[1:]), ValueError, r"objective \(T \+ 1, B\), .* and \(4, 1\)"),
        (EMStages(GOOD.z, GOOD.objective[:, 0]), ValueError, r"objective \(T \+ 1, B\), .* and \(5,\)"),
        ({"a": GOOD, "b": stages(4, 5, batch=2)}, ValueError, "same samples; got {'a': 1, 'b': 2}"),
    ],
)
def test_what_are_no_stages_is_refused_in_one_sentence(wrong, error, message):
    with pytest.raises(error, match=message) as caught:
        explore_stages(wrong, torch.rand(1, 3, 8, 10))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", ["a", [1], [None]])
def test_names_are_strings(names):
    with pytest.raises(TypeError, match="names must be a list of strings; got " + re.escape(repr(names))):
        explore_stages(GOOD, torch.rand(1, 3, 8, 10), names=names)


@pytest.mark.parametrize("package", ["numpy", "PIL"])
def test_without_a_package_the_error_names_the_extra(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    photos = torch.rand(1, 3, 8, 10)
    for explore in (lambda: explore_stages(GOOD, photos), lambda: explore_attention(EMAUnit(3, 2), photos, photos)):
        with pytest.raises(ImportError, match=r'needs numpy and Pillow: pip install "ema-attention\[plot\]"'):
            explore()
