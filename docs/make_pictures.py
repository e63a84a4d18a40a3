"""Makes the pictures of the site, from photographs of scikit-image and scikit-learn and the demo's offline backbone.

python -m docs.make_pictures

It needs ``pip install "ema-attention[examples]"``.
"""

from __future__ import annotations

import io
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ema_attention import EMStages, em_stages, plot_attention_maps, plot_em_stages
from ema_attention.look.pictures import as_photo, draw_assignment
from examples._common.photos import efficientnet_lite0, extract_features, farthest_positions, read_photo

FOLDER = Path(__file__).with_name("pictures")
STAGES, SCALE = 15, 10.0  # the demo's
GALLERY = {  # a good basis of 6 and a bad one
    "skimage.data/chelsea.png": (0, 4),
    "sklearn.datasets.images/china.jpg": (0, 2),
    "sklearn.datasets.images/flower.jpg": (2, 1),
    "skimage.data/coins.png": (0, 4),
    "skimage.data/motorcycle_left.png": (4, 0),
    "skimage.data/coffee.png": (2, 5),
    "skimage.data/astronaut.png": (1, 0),
    "skimage.data/rocket.jpg": (4, 1),
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    photo = read_photo(None, 448)
    backbone = efficientnet_lite0("DEFAULT")
    x = extract_features(backbone, photo)
    stages = attend(x, 6, SCALE)
    save(plot_em_stages(photo, stages.z[:, 0], stages.objective[:, 0]), "stages.png")
    save(plot_choices(photo, x), "choices.png")
    for source, bases in GALLERY.items():
        package, name = source.split("/")
        with as_file(files(package) / name) as path:
            photo = read_photo(path, 448)
        z = attend(extract_features(backbone, photo), 6, SCALE).z[-1, 0]
        path = FOLDER / f"gallery_{Path(name).stem}.jpg"
        plot_attention_maps(photo, z, bases=bases).savefig(path, dpi=100, pil_kwargs={"quality": 88})
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


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
            ax.set(title=f"K = {bases}, scale = {scale:g}", xticks=[], yticks=[])
            draw_assignment(ax, as_photo(photo), F.interpolate(z, photo.shape[:2], mode="bilinear")[0])
    return figure


def save(picture: Figure, name: str) -> None:
    """Writes a PNG of 200 colours, which is a third of the size."""
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=100)
    Image.open(buffer).convert("RGB").quantize(200, dither=Image.Dither.NONE).save(FOLDER / name, optimize=True)
    print(f"{FOLDER / name}: {(FOLDER / name).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
