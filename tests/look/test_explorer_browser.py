"""The explorer in a real browser: what its page shows is what is in the tensors."""

import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ema_attention import EMAUnit, EMStages, em_stages, explore_attention, explore_stages, model_stages
from ema_attention.look.pictures import certainty

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

ARGUMENTS = ["no-sandbox", "disable-gpu", "no-first-run", "disable-sync"]
ARGUMENTS += ["disable-background-networking", "disable-component-update"]
BASES, HEIGHT, WIDTH = 9, 6, 8
STEP = 0.0007  # of a value from 0 to 1: half of the last digit shown, and half of one of the 4,095 levels


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=CHROMIUM, args=[f"--{argument}" for argument in ARGUMENTS], timeout=60_000
        )
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, tmp_path):
    """Opens a page as a file; afterwards it has asked the network for nothing and complained of nothing."""
    troubles, contexts = [], []

    def visit(html, **options):
        path = tmp_path / "page.html"
        path.write_text(html, encoding="utf-8")
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options}))
        page = contexts[-1].new_page()
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on(
            "request",
            lambda request: None if request.url.startswith(("data:", path.as_uri())) else troubles.append(request.url),
        )
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready]")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert troubles == []


def problem(*spatial: int, bases: int = BASES, number: int = 5) -> EMStages:
    torch.manual_seed(1)
    mu = F.normalize(torch.randn(4, bases), dim=0)
    return em_stages(torch.randn(1, 4, *spatial), mu, number, scale=3.0)


@pytest.fixture(scope="module")
def stages() -> EMStages:
    return problem(HEIGHT, WIDTH)


@pytest.fixture
def page(visit, stages):
    return visit(explore_stages(stages, torch.rand(1, 3, 120, 160), names=["cat"]))


def number(text: str) -> float:
    return float(re.search(r"[\d.,]+", text)[0].replace(",", ""))


def bars(page) -> dict[int, float]:
    rows = page.locator("#bars button").all()
    return {int(row.get_attribute("data-basis")): number(row.locator(".value").inner_text()) / 100 for row in rows}


def hover(page, row: int, column: int, index: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    box = page.locator(".stack").nth(index).bounding_box()
    x, y = ((i + 0.5) / length for i, length in zip((column, row), size[::-1], strict=True))
    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])


def painted(page, rows: int = HEIGHT, columns: int = WIDTH) -> torch.Tensor:
    """Red, green, blue and alpha of what lies over the image, (rows, columns, 4), in the middle of each position."""
    pixels = page.evaluate(
        "([rows, columns]) => { const shown = document.querySelector('.stack canvas'), { width, height } = shown;"
        "const context = new OffscreenCanvas(width, height).getContext('2d'); context.drawImage(shown, 0, 0);"
        "const { data } = context.getImageData(0, 0, width, height);"
        "return Array.from({ length: 4 * rows * columns }, (_, i) => {"
        "  const n = i >> 2, y = Math.floor(((Math.floor(n / columns) + 0.5) / rows) * height);"
        "  return data[4 * (y * width + Math.floor((((n % columns) + 0.5) / columns) * width)) + (i & 3)]; }); }",
        [rows, columns],
    )
    return torch.tensor(pixels).view(rows, columns, 4)


def shows(page, z: torch.Tensor) -> None:
    """The bars are the largest values of z (K,), in their order, and the rest."""
    shown = bars(page)
    assert len(shown) == (len(z) if len(z) <= 7 else 6)
    for k, value in shown.items():
        assert value == pytest.approx(z[k].item(), abs=STEP)
    values = list(shown.values())
    assert values == sorted(values, reverse=True)
    assert values == pytest.approx(z.sort(descending=True).values[: len(values)].tolist(), abs=STEP)
    if len(z) > 7:
        rest = number(page.locator("#rest .value").inner_text()) / 100
        assert rest == pytest.approx(1 - sum(values), abs=6 * STEP)


def test_moving_over_a_position_shows_which_bases_explain_it(page, stages):
    for row, column in ((0, 0), (5, 7), (2, 3), (0, 7)):
        hover(page, row, column)
        assert page.inner_text("#where") == f"row {row}, column {column}"
        shows(page, stages.z[-1, 0, :, row, column])


def test_the_slider_steps_through_the_stages_and_marks_the_objective(page, stages):
    hover(page, 2, 3)
    drawn = page.locator("#curve circle").evaluate_all("all => all.map((one) => Number(one.dataset.value))")
    assert drawn == pytest.approx(stages.objective[:, 0].tolist())
    heights = page.locator("#curve circle").evaluate_all("all => all.map((one) => Number(one.getAttribute('cy')))")
    assert heights == sorted(heights, reverse=True)
    assert page.inner_text("#stage-title") == "EM stage 5 of 5"
    page.focus("#slider")
    for stage in (4, 3, 2, 1):
        page.keyboard.press("ArrowLeft")
        assert page.inner_text("#stage-title") == f"EM stage {stage} of 5"
        now = page.locator("#curve circle.now")
        assert float(now.get_attribute("data-value")) == pytest.approx(stages.objective[stage, 0].item())
        assert number(page.locator("#curve text").first.text_content()) == pytest.approx(
            stages.objective[stage, 0].item(), rel=1e-5
        )
        hover(page, 2, 3)
        shows(page, stages.z[stage - 1, 0, :, 2, 3])


def test_playing_ends_at_the_last_stage(page):
    page.click("#play")
    assert page.inner_text("#stage-title") == "EM stage 1 of 5"
    page.wait_for_selector("#stage-title:text-is('EM stage 5 of 5')")
    assert page.get_attribute("#play", "aria-label") == "Play the stages"


def test_choosing_a_basis_shows_its_map_its_share_and_its_strongest_positions(page, stages):
    z = stages.z[-1, 0]
    for k in range(BASES):
        page.click(f'#maps [data-basis="{k}"]')
        assert page.inner_text("#basis-title") == f"Basis {k}"
        assert number(page.inner_text("#share")) / 100 == pytest.approx(z[k].mean().item(), abs=0.0006)
        assert page.get_attribute(f'#maps [data-basis="{k}"]', "aria-pressed") == "true"
        places = page.locator("#places button").all()
        assert int(places[0].get_attribute("data-position")) == z[k].argmax()
        for place in places:
            n = int(place.get_attribute("data-position"))
            assert f"row {n // WIDTH}, column {n % WIDTH}" in place.inner_text()
            assert number(place.locator(".value").inner_text()) / 100 == pytest.approx(
                z[k].flatten()[n].item(), abs=STEP
            )
        assert page.locator(".stack .ring").count() == len(places)
        # The map itself: cividis from dark blue to yellow, so that red grows with z.
        red = painted(page)[..., 0].flatten()[z[k].flatten().argsort()]
        assert (red.diff() >= -3).all()
        assert red[-1] > red[0] + 20
    places[0].click()
    n = int(z[BASES - 1].argmax())
    assert page.inner_text("#where") == f"row {n // WIDTH}, column {n % WIDTH}"
    shows(page, z[:, n // WIDTH, n % WIDTH])


def test_the_segments_are_the_strongest_bases(page, stages):
    """The pixel in the middle of a position is close to that position's own maps: not where two are nearly equal."""
    colours = page.locator("#maps .swatch").evaluate_all(
        "all => all.map((one) => getComputedStyle(one).backgroundColor.match(/\\d+/g).map(Number))"
    )
    z = stages.z[-1, 0]
    first, second = z.topk(2, dim=0).values
    clear = first - second > 0.1
    assert clear.sum() > 20
    expected = torch.tensor(colours)[z.argmax(0)]
    assert ((painted(page)[..., :3] - expected).abs() <= 2)[clear].all()  # 2: a canvas keeps colours times their alpha
    numbers = set(page.locator(".stack .tag").all_inner_texts())
    assert numbers <= {str(k) for k in z.argmax(0).unique().tolist()}
    assert len(numbers) >= 4


def test_the_keyboard_alone_is_enough(page, stages):
    z = stages.z[-1, 0]
    page.locator(".stack").focus()
    for _ in range(8):
        page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowLeft")
    assert page.inner_text("#where") == "row 0, column 0"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Shift+ArrowRight")
    assert page.inner_text("#where") == "row 1, column 5"
    shows(page, z[:, 1, 5])
    k = int(z[:, 1, 5].argmax())
    assert page.text_content("#said").startswith(f"row 1, column 5: basis {k} ")
    page.keyboard.press("Enter")
    assert page.inner_text("#basis-title") == f"Basis {k}"
    assert page.is_checked('#show [value="basis"]')
    page.keyboard.press("Escape")
    assert page.is_checked('#show [value="segments"]')
    for _ in range(3):  # past the opacity and the picture's button
        page.keyboard.press("Tab")
    row = page.locator("#bars button").nth(0)
    assert row.evaluate("element => element === document.activeElement")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_every_control_has_a_name(page):
    unnamed = page.evaluate(
        "() => [...document.querySelectorAll('button, input, [tabindex]')].filter((one) =>"
        " !one.getAttribute('aria-label') && !one.textContent.trim() && !one.labels?.[0]?.textContent.trim())"
        ".map((one) => one.outerHTML)"
    )
    assert unnamed == []


def test_a_click_chooses_the_strongest_basis_and_stays(page, stages):
    z = stages.z[-1, 0]
    hover(page, 4, 6)
    page.mouse.down()
    page.mouse.up()
    assert page.inner_text("#basis-title") == f"Basis {int(z[:, 4, 6].argmax())}"
    hover(page, 0, 0)
    assert page.inner_text("#where") == "row 0, column 0"
    page.mouse.move(5, 5)  # off the image
    assert page.inner_text("#where") == "row 4, column 6"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(visit, stages, scheme):
    page = visit(
        explore_stages(stages, torch.rand(1, 3, 120, 160)),
        viewport={"width": 390, "height": 844},
        has_touch=True,
        color_scheme=scheme,
        device_scale_factor=2,
    )
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    box = page.locator(".stack").bounding_box()
    assert box["width"] > 320
    page.touchscreen.tap(box["x"] + 3.5 / WIDTH * box["width"], box["y"] + 1.5 / HEIGHT * box["height"])
    assert page.inner_text("#where") == "row 1, column 3"
    shows(page, stages.z[-1, 0, :, 1, 3])
    light = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(light) > 600) == (scheme == "light")


def test_units_and_images_side_by_side(visit):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 2, 2), EMAUnit(8, 4, stages=5), nn.Conv2d(8, 6, 2, 2), EMAUnit(6, 7, stages=2)
    )
    photos = torch.rand(2, 3, 32, 48)
    stages = model_stages(model, photos)
    page = visit(explore_attention(model, photos, photos, names=["left", "</script>"]))
    names = [f"{name} · unit {unit}" for name in ("left", "</script>") for unit in (1, 3)]
    assert page.locator(".view .name").all_inner_texts() == names
    for index, (image, unit) in enumerate(((0, "1"), (0, "3"), (1, "1"), (1, "3"))):
        z = stages[unit].z[-1, image]
        hover(page, 3, 2, index, z.shape[1:])
        shows(page, z[:, 3, 2])
        assert page.locator(".cell:visible").count() == 2  # both units of the image
    page.mouse.down()
    page.mouse.up()
    assert page.inner_text("#bases-title") == "All 7 bases of </script> · unit 3"
    assert page.inner_text("#stage-title") == "EM stage 2 of 2"


def test_a_signal_and_a_volume(visit):
    signal = problem(9, bases=3)
    page = visit(explore_stages(signal, [torch.randn(2, 50)]))
    hover(page, 0, 4, size=(1, 9))
    assert page.inner_text("#where") == "position 4"
    shows(page, signal.z[-1, 0, :, 4])
    assert page.locator(".stack path.line").count() == 2

    volume = problem(3, 4, 5, bases=3)
    page = visit(explore_stages(volume, [torch.rand(3, 6, 40, 50)]))
    for index in (0, 2, 1):
        page.locator("#slice").fill(str(index))
        hover(page, 1, 2, size=(4, 5))
        assert page.inner_text("#where") == f"slice {index}, row 1, column 2"
        assert page.locator(".stack img").evaluate_all("all => all.findIndex((one) => !one.hidden)") == index
        shows(page, volume.z[-1, 0, :, index, 1, 2])
    page.locator(".stack").focus()
    page.keyboard.press("PageDown")
    assert page.inner_text("#slice-label") == "Slice 2 (0 to 2)"


def test_all_units_show_the_same_slice_of_a_volume(visit):
    model = nn.Sequential(
        nn.Conv3d(2, 8, 1), EMAUnit(8, 3), nn.Conv3d(8, 8, (2, 1, 1), (2, 1, 1)), EMAUnit(8, 4, gradient="all")
    )
    page = visit(explore_attention(model, torch.rand(1, 2, 4, 5, 6), [torch.rand(3, 4, 40, 48)]))
    shown = "all => all.map((stack) => [...stack.querySelectorAll('img')].findIndex((frame) => !frame.hidden))"
    for index in (3, 0, 2):
        hover(page, 0, 0, 0, (5, 6))
        page.mouse.down()
        page.mouse.up()
        page.locator("#slice").fill(str(index))
        assert page.locator(".stack").evaluate_all(shown) == [index, index // 2]
        assert page.locator(".cell:visible").count() == 2
    hover(page, 4, 3, 1, (5, 6))
    page.mouse.down()
    page.mouse.up()
    page.locator("#slice").fill("0")
    assert page.locator(".stack").evaluate_all(shown) == [1, 0]


def test_a_position_that_takes_no_part_says_so(visit):
    mask = torch.ones(1, 6, 8, dtype=torch.bool)
    mask[..., 5:] = False
    stages = em_stages(torch.randn(1, 4, 6, 8), F.normalize(torch.randn(4, 3), dim=0), 3, mask=mask)
    page = visit(explore_stages(stages, torch.rand(1, 1, 60, 80)))
    hover(page, 2, 6)
    assert bars(page) == {}
    assert page.inner_text("#sum") == "This position takes no part in EM."
    hover(page, 2, 4)
    shows(page, stages.z[-1, 0, :, 2, 4])
    for show in ("segments", "basis"):
        page.check(f'#show [value="{show}"]')
        assert (painted(page)[:, 5:, 3] == 0).all()
        assert (painted(page)[:, :5, 3] > 0).all()


def test_a_sample_of_no_position_says_so(visit, stages):
    z = torch.cat([stages.z, 0 * stages.z], 1)
    page = visit(explore_stages(EMStages(z, torch.zeros(6, 2)), torch.rand(2, 3, 60, 80)))
    for index, masked in ((1, True), (0, False)):
        page.locator(".stack").nth(index).focus()
        page.check('#show [value="basis"]')
        assert page.inner_text("#legend").startswith("No position of this image takes part in EM.") == masked
        assert page.locator("#legend .scale").count() == (not masked)
        assert page.is_visible("#places-title") != masked
        assert page.is_visible("#no-places") == masked


def test_a_basis_is_chosen_in_every_image_and_drawn_on_one_scale(visit):
    """Of the same unit; another unit keeps its own basis."""
    z = torch.tensor([[0.4, 0.3, 0.3], [0.2, 0.5, 0.3]]).view(1, 2, 3, 1, 1).repeat(1, 1, 1, 6, 8)
    z[..., 0, 0] = torch.tensor([0.5, 0.25, 0.25])  # basis 0 stands out there
    units = {"a": EMStages(z, torch.zeros(2, 2)), "b": EMStages(z[:, :, :2].flip(1), torch.zeros(2, 2))}
    page = visit(explore_stages(units, torch.rand(2, 3, 60, 80), names=["left", "right"]))
    page.check('#show [value="basis"]')

    def shown() -> list[str]:
        return [name.rpartition(" ")[2] for name in page.locator(".view .name").all_inner_texts()]

    def reds() -> list[int]:
        return page.locator(".stack canvas").evaluate_all(
            "all => all.map((shown) => { const context = new OffscreenCanvas(8, 6).getContext('2d');"
            "context.drawImage(shown, 0, 0); return context.getImageData(2, 2, 1, 1).data[0]; })"
        )

    assert shown() == ["0", "0", "0", "0"]
    page.click('#maps [data-basis="1"]')
    assert shown() == ["1", "0", "1", "0"]
    left, _, right, _ = reds()
    assert right > left + 50, (left, right)
    page.click('#maps [data-basis="2"]')
    assert shown() == ["2", "0", "2", "0"]
    left, _, right, _ = reds()
    assert abs(left - right) < 8  # which colours lose where they are faint
    assert "50.0" in page.inner_text("#legend")
    assert "basis 2 of unit a" in page.inner_text("#legend")


@pytest.mark.parametrize("size", [(2, 128), (128, 2)])
def test_a_thin_image_is_stretched_until_it_can_be_seen(visit, size):
    page = visit(explore_stages(problem(*size, bases=3, number=1), torch.rand(1, 3, *size)))
    for shown in (".stack", "#maps canvas"):
        box = page.locator(shown).first.bounding_box()
        assert max(box["width"] / box["height"], box["height"] / box["width"]) == pytest.approx(6, rel=0.05)


def test_it_starts_where_a_basis_stands_out(page, stages):
    z = stages.z[-1, 0]
    k = int(page.inner_text("#basis-title").split()[1])
    n = int(z[k].argmax())
    assert page.inner_text("#where") == f"row {n // WIDTH}, column {n % WIDTH}"
    assert z[:, n // WIDTH, n % WIDTH].argmax() == k
    assert page.is_hidden("#even")


def test_the_more_evenly_a_position_is_shared_the_fainter_it_is(page, stages):
    z = stages.z[-1, 0]
    page.check('#show [value="basis"]')
    assert ((painted(page)[..., 3] / 255 - certainty(z)).abs() < 0.01).all()
    page.check('#show [value="segments"]')
    first, second = z.topk(2, dim=0).values
    clear = first - second > 0.1
    near = painted(page)[..., 3] / 255 - certainty(z)  # the pixel in the middle is interpolated
    assert (near.abs() < 0.06)[clear].all()


def test_it_says_where_there_is_nothing_to_see(visit):
    even = em_stages(torch.randn(1, 4, 6, 8), F.normalize(torch.randn(4, 5), dim=0), 3, scale=0.01)
    page = visit(explore_stages(even, torch.rand(1, 3, 60, 80)))
    assert page.is_visible("#even")
    assert re.search(r"nearly equal\..* 20\.\d\d.%.* an even share is 20\.00", page.inner_text("#even"))
    assert (painted(page)[..., 3] < 10).all()
    assert page.locator(".stack .tag").count() == 0
    page.check('#show [value="image"]')
    assert page.is_hidden("#even")


@pytest.mark.parametrize("bases", [6, 64])
def test_the_basis_and_all_bases_are_above_the_fold(visit, bases):
    page = visit(
        explore_stages(problem(9, 12, bases=bases), torch.rand(1, 3, 90, 120)), viewport={"width": 1440, "height": 900}
    )
    for card in ("#here", "#basis", "#bases"):
        box = page.locator(card).bounding_box()
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= 900
    assert page.locator("#maps button").count() == bases


def test_on_a_phone_what_a_touch_shows_is_in_sight_in_every_image(visit):
    z = problem(HEIGHT, WIDTH)
    page = visit(
        explore_stages([z] * 4, torch.rand(4, 3, 120, 160)), viewport={"width": 390, "height": 700}, has_touch=True
    )
    for index in range(4):
        stack = page.locator(".stack").nth(index)
        stack.scroll_into_view_if_needed()
        stack.tap(position={"x": 30, "y": 20})
        here, touched = page.locator("#here").bounding_box(), stack.bounding_box()
        assert here["y"] >= 0
        assert here["y"] + here["height"] <= 700
        assert touched["y"] + 20 < here["y"]
        shows(page, z.z[-1, 0, :, int(20 / touched["height"] * HEIGHT), int(30 / touched["width"] * WIDTH)])


def test_the_opacity_and_the_picture_that_is_saved(visit, stages):
    page = visit(explore_stages(stages, torch.full((1, 3, 120, 160), 0.5), names=["cat"]))
    page.locator("#opacity").fill("100")
    assert page.evaluate("getComputedStyle(document.querySelector('.stack canvas')).opacity") == "1"
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == "cat-segments.png"
    with Image.open(download.value.path()) as image:
        assert image.size == (1280, 960)
        pixels = np.asarray(image.convert("RGB"))[80::160, 80::160]
    colours = page.locator("#maps .swatch").evaluate_all(
        "all => all.map((one) => getComputedStyle(one).backgroundColor.match(/\\d+/g).map(Number))"
    )
    z = stages.z[-1, 0]
    sure = z.amax(0) > 0.97
    assert sure.sum() >= 3
    assert (np.abs(pixels[sure] - np.array(colours)[z.argmax(0)[sure]]).max(1) < 12).mean() > 0.6  # but for the numbers
    page.locator("#opacity").fill("0")
    page.keyboard.press("3")
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == "cat-basis-3.png"
    with Image.open(download.value.path()) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert (np.ptp(pixels, 2) == 0).all()  # grey: nothing lies over it


def test_the_address_keeps_what_is_shown(page, browser):
    page.keyboard.press("4")
    page.focus("#slider")
    page.keyboard.press("ArrowLeft")
    page.locator("#opacity").fill("55")
    hover(page, 3, 5)
    page.mouse.down()
    page.mouse.up()
    shown = int(page.inner_text("#basis-title").split()[1])
    page.wait_for_url(f"**#view=0&stage=4&show=basis&basis={shown}&at={3 * WIDTH + 5}&opacity=55")
    again = browser.new_page()
    for part, basis in ((page.url.partition("#")[2], shown), ("view=9&basis=-1&basis=1&at=x&show=all&stage=0", None)):
        again.goto("about:blank")
        again.goto(page.url.partition("#")[0] + "#" + part)
        again.wait_for_selector("body[data-ready]")
        if basis is None:  # nonsense: as it starts
            assert again.inner_text("#stage-title") == "EM stage 5 of 5"
            assert again.is_checked('#show [value="segments"]')
        else:
            assert again.inner_text("#stage-title") == "EM stage 4 of 5"
            assert again.inner_text("#where") == "row 3, column 5"
            assert again.inner_text("#basis-title") == f"Basis {basis}"
            assert again.input_value("#opacity") == "55"
            again.evaluate("location.hash = 'basis=2'")
            again.wait_for_selector("#basis-title:text-is('Basis 2')")
    again.close()


def test_a_number_chooses_its_basis(visit):
    page = visit(explore_stages(problem(6, 8, bases=12), torch.rand(1, 3, 60, 80)))
    for digits, basis in (("1", 1), ("1", 11), ("5", 5), ("9", 9)):  # 11: typed in one go
        page.keyboard.type(digits)
        assert page.inner_text("#basis-title") == f"Basis {basis}"
    page.keyboard.press("Control+3")
    assert page.inner_text("#basis-title") == "Basis 9"


def test_a_notebook_shows_the_page_in_a_frame_that_leaves_it_alone(browser, tmp_path, stages):
    html = explore_stages(stages, torch.rand(1, 3, 60, 80), names=['"</iframe>'])
    path = tmp_path / "notebook.html"
    path.write_text(f"<!doctype html><meta charset=utf-8><h1>Notebook</h1>{html._repr_html_()}<p>after</p>", "utf-8")
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    troubles = []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    before = page.evaluate("getComputedStyle(document.body).fontFamily")
    page.goto(path.as_uri())
    frame = page.frames[1]
    frame.wait_for_selector("body[data-ready]")
    assert frame.inner_text("#caption") == '"</iframe>'
    frame.focus(".stack")
    page.keyboard.press("2")
    assert frame.inner_text("#basis-title") == "Basis 2"
    with page.expect_download() as download:
        frame.click("#save")
    assert download.value.suggested_filename == "-iframe-basis-2.png"
    page.wait_for_timeout(300)  # for what it would write into the address
    assert page.url == path.as_uri()
    assert page.inner_text("p") == "after"
    assert page.evaluate("getComputedStyle(document.body).fontFamily") == before
    assert troubles == []
    page.close()


def test_a_damaged_page_says_so(browser, tmp_path):
    (tmp_path / "page.html").write_text(
        explore_stages(problem(2, 3), torch.rand(1, 3, 4, 6)).replace('{"views"', '{"views'), encoding="utf-8"
    )
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_selector("#trouble:has-text('This page is damaged')")
    page.close()
