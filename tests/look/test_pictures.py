import io
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ema_attention.look.pictures import as_photo, certainty, plot_attention_maps, plot_em_stages

IMAGE = torch.rand(3, 20, 30)


def maps(num_bases: int, height: int = 6, width: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (4 * torch.randn(num_bases, height, width, generator=generator)).softmax(0)


def panels(figure):
    """The axes of the photograph, of the maps, of the assignment, by their titles."""
    first, *middle, last, _ = figure.axes
    assert first.get_title() == "photograph"
    assert last.get_title().startswith("hard assignment")
    return first, middle, last


def draw(figure) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer)
    return np.asarray(Image.open(buffer).convert("RGB"))


def boxes_overlap(a, b) -> bool:
    return a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1


def test_pictures_are_made_on_the_cpu_and_in_float32_whatever_the_defaults_are() -> None:
    z, stages = maps(4), torch.stack([maps(4), maps(4)])
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")  # stands for a GPU: nothing on it can be drawn
    try:
        plot_attention_maps(IMAGE, z)
        plot_em_stages(IMAGE, stages, z.new_zeros(3))
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("num_bases", [1, 2, 6, 8, 12, 16, 64])
@pytest.mark.parametrize("even", [False, True])
def test_every_map_has_a_legible_panel_and_a_colour_of_its_own(num_bases, even):
    z = torch.full((num_bases, 6, 9), 1 / num_bases) if even else maps(num_bases)
    figure = plot_attention_maps(torch.rand(3, 40, 60), z)
    first, middle, last = panels(figure)
    assert last.get_title() == "hard assignment" + (f" of all {num_bases}" if num_bases > 12 else "")
    figure.canvas.draw()
    assert len(middle) == min(num_bases, 12)
    assert figure.legends == []

    texts = [ax.title.get_window_extent() for ax in (first, *middle, last)]
    boxes = [ax.get_window_extent() for ax in (first, *middle, last)]
    boxes += [figure.axes[-1].get_tightbbox(), *(text.get_window_extent() for text in figure.texts)]
    everything = texts + boxes
    for i, a in enumerate(everything):
        assert min(a.x0, a.y0) >= 0
        assert a.x1 <= figure.bbox.x1
        assert a.y1 <= figure.bbox.y1
        assert not any(boxes_overlap(a, b) for b in everything[i + 1 :])
    assert all(ax.title.get_size() >= 10 for ax in middle)
    frames = [ax.spines["left"].get_edgecolor() for ax in middle]
    assert len(set(frames)) == len(middle)


def shown(figure) -> list[int]:
    return [int(ax.get_title().split()[1]) for ax in panels(figure)[1]]


def test_the_maps_are_those_of_the_largest_share_or_those_that_are_asked_for():
    z = maps(20)
    shares = z.mean((1, 2))
    assert shown(plot_attention_maps(IMAGE, z)) == shares.argsort(descending=True)[:12].tolist()
    figure = plot_attention_maps(IMAGE, z, bases=[7, 19, 2])
    assert shown(figure) == [7, 19, 2]
    assert np.allclose(
        panels(plot_attention_maps(z[:3].mean(0)[None], z, bases=(19,)))[1][0].images[-1].get_array(), z[19]
    )
    assert len({text.get_text() for text in panels(figure)[2].texts}) > 3  # the assignment is of all
    assert shown(plot_attention_maps(z[:3].mean(0)[None], z, bases=torch.tensor([19, 2]))) == [19, 2]


def test_a_photograph_as_high_as_a_strip_needs_no_high_figure():
    figure = plot_attention_maps(torch.rand(3, 600, 2), maps(3))
    assert figure.get_size_inches()[1] < 40


@pytest.mark.parametrize("bases", [[], [1, 1], [-1], [4], [0.5], [True]])
def test_bases_that_are_none_are_refused(bases):
    with pytest.raises(
        ValueError, match="bases must be different numbers from 0 to 3, one or more; got " + re.escape(str(bases))
    ):
        plot_attention_maps(IMAGE, maps(4), bases=bases)


def test_it_says_where_there_is_nothing_to_see_and_fades_what_is_shared_evenly():
    even = (0.01 * maps(8)).softmax(0)
    assert plot_attention_maps(IMAGE, maps(8)).texts == []
    figure = plot_attention_maps(IMAGE, even)
    assert (
        figure.texts[0].get_text().startswith("Nothing to see: the bases are nearly equal. The strongest explains 12.")
    )
    assert list(panels(figure)[2].texts) == []
    z = torch.full((4, 20, 30), 0.25)
    z[:, :, 15:] = torch.tensor([1.0, 0, 0, 0]).view(4, 1, 1)
    z[:, :, 20:] = torch.tensor([0.5, 0.5, 0, 0]).view(4, 1, 1)
    _, (heat, *_), last = panels(plot_attention_maps(IMAGE, z))
    for ax, most in ((heat, 0.7), (last, 0.8)):
        opacity = ax.images[-1].get_alpha()
        assert np.allclose([opacity[0, 0], opacity[0, 17], opacity[0, 25]], [0, most, most / 2])
    masked = torch.zeros(4, 20, 30)
    assert plot_attention_maps(IMAGE, masked).texts == []


def test_a_notebook_shows_a_figure_and_it_saves_itself(tmp_path):
    for number, figure in enumerate((plot_attention_maps(IMAGE, maps(3)), plot_em_stages(IMAGE, *stages(3)))):
        assert figure._repr_png_().startswith(b"\x89PNG")
        for name in (f"{number}.pdf", f"{number}.png"):
            figure.save(tmp_path / name)
        assert (tmp_path / f"{number}.pdf").read_bytes().startswith(b"%PDF")
        assert (tmp_path / f"{number}.png").read_bytes() == figure._repr_png_()


def test_titles_have_the_share_of_the_image():
    z = torch.zeros(3, 2, 4)
    z[0, :, 0] = 1
    z[2, :, 1:] = 1
    _, middle, _ = panels(plot_attention_maps(torch.rand(3, 20, 40), z))
    assert [ax.get_title() for ax in middle] == ["basis 2 · 75.0%", "basis 0 · 25.0%", "basis 1 · 0.0%"]


def test_the_colour_bar_goes_from_0_to_the_largest_value_and_every_map_uses_it():
    z = (maps(3, 20, 30) + 1) / 4  # nowhere near 1
    figure = plot_attention_maps(IMAGE, z)
    assert figure.axes[-1].get_ylim() == (0, pytest.approx(z.max().item()))
    for ax in panels(figure)[1]:
        photo, heat = ax.images
        assert heat.get_clim() == (0, z.max().item())
        assert photo.get_array().shape == heat.get_array().shape == (20, 30)


def test_the_assignment_is_the_largest_z_with_its_number_inside_the_region():
    z = maps(5, 4, 4)
    _, _, last = panels(plot_attention_maps(torch.rand(3, 4, 4), z))
    assignment = last.images[-1].get_array()
    assert (assignment == z.argmax(0).numpy()).all()
    clear = z.argmax(0)[certainty(z) >= 0.1]
    assert 1 < len(last.texts) <= len(clear.unique())
    for text in last.texts:
        x, y = text.get_position()
        assert assignment[y, x] == int(text.get_text())


@pytest.mark.parametrize("z", [maps(64, 1, 196).squeeze(1)[None], maps(4)[:3]])
def test_maps_of_which_some_are_missing_are_refused(z: torch.Tensor):
    with pytest.raises(ValueError, match="z must sum to 1 over the K bases at each position, or to 0; got a sum of"):
        plot_attention_maps(torch.rand(3, 8, 8), z)


def test_maps_in_half_precision_are_not_refused():
    plot_attention_maps(torch.rand(3, 8, 8), maps(64, 20, 20).bfloat16())


def test_every_region_has_its_number_where_there_is_room():
    z = torch.full((6, 20, 30), 0.01)
    for k in range(6):
        z[k, 10 * (k // 3) : 10 * (k // 3) + 10, 10 * (k % 3) : 10 * (k % 3) + 10] = 0.95
    *_, last = panels(plot_attention_maps(torch.rand(3, 20, 30), z))
    assert sorted(int(text.get_text()) for text in last.texts) == list(range(6))


def test_numbers_of_many_bases_do_not_cover_each_other():
    figure = plot_attention_maps(torch.rand(3, 120, 160), (9 * torch.randn(64, 15, 20)).softmax(0))
    *_, last = panels(figure)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in last.texts]
    assert len(boxes) > 20
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_position_that_takes_no_part_has_no_colour():
    z = maps(3, 4, 4)
    z[:, :, 2:] = 0
    _, _, last = panels(plot_attention_maps(torch.rand(3, 4, 4), z))
    assignment = np.asarray(last.images[-1].get_array().astype(float).filled(np.nan))
    assert np.isnan(assignment[:, 2:]).all()
    assert not np.isnan(assignment[:, :2]).any()


def test_every_kind_of_image_gives_the_same_picture():
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randint(0, 256, (3, 20, 30), generator=generator, dtype=torch.uint8)
    array = tensor.permute(1, 2, 0).numpy()
    z = maps(2)
    expected = draw(plot_attention_maps(tensor, z))
    assert expected.std() > 10
    arrays = (array, array / 255, (array / 255).astype(">f4"), (array / 255).astype(np.longdouble))
    for image in (*arrays, Image.fromarray(array), tensor / 255, (tensor / 255).requires_grad_()):
        assert np.abs(draw(plot_attention_maps(image, z.requires_grad_())).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["P", "RGBA", "L", "1", "CMYK"])
def test_an_image_of_pillow_is_converted_by_its_mode(mode):
    image = Image.effect_noise((30, 20), 60).convert("RGB").convert(mode)
    expected = torch.from_numpy(np.array(image.convert("RGB"))) / 255
    torch.testing.assert_close(as_photo(image).expand(-1, -1, 3), expected)


def test_a_grey_image_is_drawn_grey():
    grey = torch.linspace(0, 1, 600).view(20, 30)
    for image in (grey[None], grey.numpy(), (grey * 255).byte().numpy()):
        first, _, _ = panels(plot_attention_maps(image, maps(2)))
        (photo,) = first.images
        assert photo.get_array().shape == (20, 30)
        assert photo.get_cmap().name == "gray"
        assert photo.get_clim() == (0, 1)


def test_a_large_photograph_is_shrunk_and_keeps_its_shape():
    first, middle, _ = panels(plot_attention_maps(torch.rand(3, 2000, 1000), maps(2)))
    assert first.images[0].get_array().shape == (640, 320, 3)
    assert middle[0].images[-1].get_array().shape == (640, 320)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_maps_of_any_floating_point_dtype(dtype):
    _, middle, _ = panels(plot_attention_maps(torch.rand(3, 6, 9, dtype=dtype), maps(2).to(dtype), bases=[1]))
    assert np.allclose(middle[0].images[-1].get_array(), maps(2)[1], atol=1e-2)


@pytest.mark.parametrize(
    ("image", "z", "error", "message"),
    [
        (IMAGE, torch.rand(2, 3, 4, 5), ValueError, r"z must be \(K, H, W\), one sample .*; got \(2, 3, 4, 5\)"),
        (IMAGE, torch.rand(4, 5), ValueError, r"z must be \(K, H, W\), one sample of the maps; got \(4, 5\)"),
        (IMAGE, torch.rand(0, 4, 5), ValueError, r"z must be \(K, H, W\), one sample of the maps; got \(0, 4, 5\)"),
        (IMAGE, torch.full((2, 4, 5), -3.0), ValueError, "z must have values from 0 to 1; got -3 to -3"),
        (IMAGE, torch.full((2, 4, 5), torch.nan), ValueError, "z must have values from 0 to 1; got nan to nan"),
        (
            IMAGE,
            torch.ones(2, 4, 5, dtype=torch.int64),
            TypeError,
            "z must be of a floating .*; got torch.int64",
        ),
        (IMAGE, np.ones((2, 4, 5)), TypeError, "z must be a tensor; got ndarray"),
        (IMAGE[None], maps(2), ValueError, r"image must be .*; got Tensor \(1, 3, 20, 30\)"),
        (IMAGE[0], maps(2), ValueError, r"image must be .*; got Tensor \(20, 30\)"),
        (IMAGE.permute(1, 2, 0), maps(2), ValueError, r"image must be .*; got Tensor \(20, 30, 3\)"),
        (IMAGE.numpy(), maps(2), ValueError, r"image must be .*; got ndarray \(3, 20, 30\)"),
        (np.zeros((20, 30, 4)), maps(2), ValueError, r"image must be .*; got ndarray \(20, 30, 4\)"),
        (np.zeros((0, 30)), maps(2), ValueError, r"image must be .*; got ndarray \(0, 30\)"),
        (IMAGE * 255, maps(2), ValueError, r"image must have values from 0 to 1; got .* to 25[.\d]+$"),
        (IMAGE - 1, maps(2), ValueError, r"got -.* \(a model's input is normalised: give the image before that\)$"),
        (IMAGE.long(), maps(2), TypeError, "image must be uint8 or floating point; got torch.int64"),
        (Image.new("I", (30, 20)), maps(2), TypeError, "image must be uint8 or floating point; got int32"),
        ("cat.png", maps(2), TypeError, "image must be uint8 or floating point; got str"),
        (None, maps(2), TypeError, "image must be uint8 or floating point; got NoneType"),
    ],
)
def test_mistakes_are_one_sentence(image, z, error, message):
    with pytest.raises(error, match=message) as caught:
        plot_attention_maps(image, z)
    assert "\n" not in str(caught.value)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'needs matplotlib: pip install "ema-attention\[plot\]"'):
        plot_attention_maps(IMAGE, maps(2))


def stages(number: int, num_bases: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    z = torch.stack([maps(num_bases).roll(t, 0) for t in range(number)])
    return z, torch.arange(number + 1) ** 0.5


@pytest.mark.parametrize(
    ("number", "shown"), [(1, [1]), (3, [1, 2, 3]), (6, [1, 2, 3, 4, 5, 6]), (15, [1, 2, 3, 5, 9, 15])]
)
def test_the_stages_are_drawn_with_the_objective(number, shown):
    z, objective = stages(number)
    figure = plot_em_stages(torch.rand(3, 6, 9), z, objective)
    *panels, curve = figure.axes
    assert [ax.get_title() for ax in panels] == [f"stage {stage}" for stage in shown]
    for ax, stage in zip(panels, shown, strict=True):
        assert (ax.images[-1].get_array() == z[stage - 1].argmax(0).numpy()).all()
    (line,) = curve.lines
    assert line.get_xydata() == pytest.approx(np.stack([np.arange(number + 1), objective], 1))
    assert (curve.get_xlabel(), curve.get_ylabel()) == ("EM stage", "objective J")


@pytest.mark.parametrize("num_bases", [2, 16, 64])
def test_the_panels_of_the_stages_lie_apart_and_inside_the_figure(num_bases):
    figure = plot_em_stages(torch.rand(3, 40, 60), *stages(9, num_bases))
    figure.canvas.draw()
    boxes = [box for ax in figure.axes[:-1] for box in (ax.get_window_extent(), ax.title.get_window_extent())]
    boxes.append(figure.axes[-1].get_tightbbox())
    for i, a in enumerate(boxes):
        assert min(a.x0, a.y0) >= 0
        assert a.x1 <= figure.bbox.x1
        assert a.y1 <= figure.bbox.y1
        assert not any(boxes_overlap(a, b) for b in boxes[i + 1 :])


@pytest.mark.parametrize(
    ("z", "objective", "error", "message"),
    [
        (maps(2), torch.zeros(3), ValueError, r"z must be \(T, K, H, W\), .*; got \(2, 6, 9\)"),
        (stages(2)[0].numpy(), torch.zeros(3), TypeError, "z must be a tensor; got ndarray"),
        (stages(2)[0], [1, 2, 3], TypeError, "objective must be a tensor; got list"),
        (stages(2)[0], torch.zeros(2), ValueError, r"objective must be \(3,\) for 2 stages; got \(2,\)"),
        (stages(2)[0], torch.full((3,), torch.nan), ValueError, r"objective must be finite; got \[nan, nan, nan\]"),
        (stages(2)[0] * torch.tensor([9, 1]).view(2, 1, 1, 1), torch.zeros(3), ValueError, "z must have values from 0"),
        (stages(2)[0] * torch.nan, torch.zeros(3), ValueError, "z must have values from 0 to 1; got nan to nan"),
    ],
)
def test_stages_that_do_not_fit_are_refused_in_one_sentence(z, objective, error, message):
    with pytest.raises(error, match=message):
        plot_em_stages(torch.rand(3, 12, 18), z, objective)


@pytest.mark.parametrize(("format", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_every_format_of_a_paper(format, start):
    for figure in (plot_attention_maps(IMAGE, maps(3)), plot_em_stages(IMAGE, *stages(3))):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=format)
        assert buffer.getvalue().startswith(start)


def test_no_global_state_of_pyplot_is_touched():
    import matplotlib.pyplot

    before = matplotlib.pyplot.get_fignums()
    plot_attention_maps(IMAGE, maps(2))
    assert matplotlib.pyplot.get_fignums() == before
