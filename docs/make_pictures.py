"""Makes the pictures of the site, from scikit-image's cat and the demo's offline backbone.

python -m docs.make_pictures

It needs ``pip install "ema-attention[examples,docs]"`` and Chromium.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from torch import Tensor

from ema_attention import EMStages, em_stages, explore_stages, plot_em_stages
from ema_attention.look.pictures import colour_of_basis
from examples._common.photos import efficientnet_lite0, extract_features, farthest_positions, read_photo

FOLDER = Path(__file__).with_name("pictures")
STAGES, SCALE = 15, 10.0  # the demo's


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    photo = read_photo(None, 448)
    x = extract_features(efficientnet_lite0("DEFAULT"), photo)
    stages = attend(x, 6, SCALE)
    save(plot_em_stages(photo, stages.z[:, 0], stages.objective[:, 0]), "stages.png")
    save(plot_choices(photo, x), "choices.png")
    page = explore_stages(stages, [photo], names=["the cat of scikit-image"])
    photograph(page, "explorer.png")


def attend(x: Tensor, bases: int, scale: float) -> EMStages:
    """As the demo does."""
    return em_stages(F.normalize(x, dim=1), farthest_positions(x, bases), STAGES, scale=scale)


def plot_choices(photo: np.ndarray, x: Tensor) -> Figure:
    """The strongest basis of every position, for several numbers of bases and several scales."""
    choices = [[(bases, SCALE) for bases in (2, 4, 8, 16)], [(6, scale) for scale in (1.0, 5.0, 10.0, 40.0)]]
    figure = Figure((10, 4.2), layout="constrained")
    for axes, row in zip(figure.subplots(2, 4), choices, strict=True):
        for ax, (bases, scale) in zip(axes, row, strict=True):
            z = attend(x, bases, scale).z[-1]
            z = F.interpolate(z, photo.shape[:2], mode="bilinear")[0]
            ax.imshow(photo.mean(2), cmap="gray")
            # As sure as the largest of the K values is: 1/K shows the photograph alone.
            sure = ((bases * z.amax(0) - 1) / (bases - 1)).numpy()
            palette = ListedColormap([colour_of_basis(k) for k in range(bases)])
            ax.imshow(z.argmax(0).numpy(), cmap=palette, vmin=-0.5, vmax=bases - 0.5, alpha=0.85 * sure)
            ax.set(title=f"K = {bases}, scale = {scale:g}", xticks=[], yticks=[])
            ax.set_frame_on(False)
    return figure


def photograph(html: str, name: str) -> None:
    """A picture of the explorer's page, at a position in the cat's eye."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        path = Path(folder) / "page.html"
        path.write_text(html, encoding="utf-8")
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page: Page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready]")
        box = page.locator(".stack").bounding_box()
        page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.4 * box["height"])
        save(page.screenshot(), name)
        browser.close()


def save(picture: Figure | bytes, name: str) -> None:
    """Writes a PNG of 200 colours, which is a third of the size."""
    buffer = io.BytesIO(picture if isinstance(picture, bytes) else b"")
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png", dpi=100)
    Image.open(buffer).convert("RGB").quantize(200, dither=Image.Dither.NONE).save(FOLDER / name, optimize=True)
    print(f"{FOLDER / name}: {(FOLDER / name).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
