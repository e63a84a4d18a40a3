"""Picture files: images as they are looked at, and masks whose values are classes."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base
from scipy.io import loadmat

IMAGE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
"""Pillow's modes that become RGB with 8 bits a channel as they are looked at."""
MASK_FORMATS = ("PNG", "TIFF", "BMP", "GIF", "PPM")
"""Those that keep every value."""
MASK_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")
LARGEST = {"L;2": 3, "L;2R": 3, "L;4": 15, "L;4R": 15}
"""Of grey levels of few bits, which Pillow spreads: the largest becomes white."""


class Loaded(NamedTuple):
    """A picture file, and what Pillow forgets of it once its pixels are there."""

    picture: Image.Image
    turn: int
    """The EXIF orientation."""
    coding: tuple[str, tuple[Any, ...]]
    """The decoder, and its settings: Pillow's raw mode, and more."""


def load(path: Path) -> Loaded:
    """Raises ValueError, with the file's name, for a file that is missing, broken or no picture."""
    try:
        with Image.open(path) as picture:
            codec, _, _, settings = picture.tile[0] if picture.tile else ("", (), 0, "")  # WebP has none yet
            turn = picture.getexif().get(Base.Orientation, 1)
            picture.load()
    except UnidentifiedImageError:
        raise ValueError(f"cannot read the image {path}: it is no image Pillow reads") from None
    except Exception as error:  # Pillow has many ways to say that a file is broken
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(f"cannot read the image {path}: {shorten(reason, 200)}") from None
    if picture.format == "TIFF" and turn != 1:  # Pillow 13.0 mixes up the pixels of those that are turned by a quarter
        raise ValueError(f"{path} is a TIFF file whose orientation is not 1: save it upright")
    is_grey_bmp = (picture.format, picture.mode) == ("BMP", "L")
    if is_grey_bmp and path.read_bytes()[28:30] != b"\x08\0":  # bits a pixel; nor can it read these
        raise ValueError(f"{path} is a grey BMP file of other than 8 bits: save it as PNG")
    return Loaded(picture, turn, (codec, settings if isinstance(settings, tuple) else (settings,)))


def read_image(path: Path) -> Image.Image:
    """An image in RGB, upright. Raises ValueError, with the file's name, if it cannot be read so."""
    return _read_image(path)[0]


def read_pair(image_path: Path, mask_path: Path) -> tuple[Image.Image, np.ndarray]:
    """An image in RGB, upright, and the classes (H, W), int64, of its mask: a picture of them, or a file of SBD.

    A camera's turn (EXIF) turns the image. A mask with a turn of its own is turned by that. One without is as the
    image is stored or as it is shown, which their sizes tell.

    Raises:
        ValueError: with the file's name, for one that cannot be read so, or of another size.
    """
    image, stored_size, turn = _read_image(image_path)
    mask, largest = _read_mask(mask_path)
    if turn > 1 and Base.Orientation not in mask.getexif():
        if stored_size == image.size:
            raise ValueError(
                f"{image_path} is turned by its EXIF orientation {turn} and {mask_path} has none, so that it is not "
                "known whether the mask is turned: save the image upright"
            )
        if mask.size == stored_size:
            mask.getexif()[Base.Orientation] = turn
    mask = ImageOps.exif_transpose(mask)
    if mask.size != image.size:
        (width, height), (mask_width, mask_height) = image.size, mask.size
        raise ValueError(
            f"{mask_path} must have the size of its image, {width}×{height}; got {mask_width}×{mask_height}"
        )
    classes = np.asarray(mask).astype(np.int64)
    if largest is not None:
        white = 65535 if mask.mode.startswith("I") else 255
        classes = (classes * largest + white // 2) // white
    return image, classes


def _read_image(path: Path) -> tuple[Image.Image, tuple[int, int], int]:
    """An image in RGB, upright; its size before it was turned, and the EXIF orientation that turned it."""
    picture, turn, _ = load(path)
    if picture.mode not in IMAGE_MODES:
        raise ValueError(f"{path} must have 8 bits a channel; got a picture of Pillow's mode {picture.mode}")
    return ImageOps.exif_transpose(picture).convert("RGB"), picture.size, turn


def _read_mask(path: Path) -> tuple[Image.Image, int | None]:
    """A mask; and the largest value that its file can have, where Pillow has spread the values up to white."""
    if path.suffix == ".mat":
        try:
            return Image.fromarray(loadmat(path)["GTcls"][0]["Segmentation"][0].astype(np.int32)), None
        except Exception as error:  # loadmat has many ways to say that a file is none of its own
            raise ValueError(f"cannot read the mask {path}: {error}") from None
    picture, _, (codec, (raw_mode, *others)) = load(path)
    if picture.format not in MASK_FORMATS or picture.info.get("compression") in ("jpeg", "webp"):
        raise ValueError(f"{path} must be in a format that keeps every value, such as PNG; got {picture.format}")
    if picture.mode not in MASK_MODES:
        bands = picture.getbands()
        got = "floating-point numbers" if picture.mode == "F" else f"{len(bands)}: {', '.join(bands)}"
        raise ValueError(f"{path} must have one channel, the classes; got {got}")
    if "I" in str(raw_mode).partition(";")[2]:
        raise ValueError(f"{path} must store classes; got a picture that stores white as 0")
    return picture, others[0] if codec.startswith("ppm") else LARGEST.get(raw_mode)
