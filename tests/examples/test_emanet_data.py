"""The data sets of EMANet's example: what they give, and what they say of broken files."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.io import savemat
from torchvision import tv_tensors

from examples._common.photos import read_photo
from examples._common.picture_files import read_image, read_pair
from examples._common.samples import IGNORE
from examples.emanet.data import (
    VOC_NAMES,
    Segmentation,
    augmentation,
    camvid,
    own_folder,
    read_names,
    voc,
    voc_colour,
)

MASK = np.array([[0, 1, 11], [10, 3, 3]], np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("train", "trainannot"):
        (tmp_path / folder).mkdir()
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    Image.fromarray(pixels).save(tmp_path / "train" / "a.png")
    Image.fromarray(MASK).save(tmp_path / "trainannot" / "a.png")
    return tmp_path


def test_camvid_gives_images_and_classes(root: Path) -> None:
    image, mask = camvid(root, "train")[0]
    assert isinstance(image, tv_tensors.Image)
    assert isinstance(mask, tv_tensors.Mask)
    assert image.tolist() == np.arange(18).reshape(2, 3, 3).transpose(2, 0, 1).tolist()
    assert mask.tolist() == [[0, 1, IGNORE], [10, 3, 3]]
    image, mask = camvid(root, "train", size=(4, 6))[0]
    assert image.shape == (3, 4, 6)
    assert mask.tolist() == np.kron([[0, 1, IGNORE], [10, 3, 3]], np.ones((2, 2))).tolist()


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "photo.jpg", exif=exif)
    assert read_image(tmp_path / "photo.jpg").size == (20, 30)


CLASSES = np.array([[0, 1, 2], [3, 1, 0]])
TWO = CLASSES % 2


def packed(row: np.ndarray, bits: int) -> bytes:
    """Values of a few bits each, filled up to whole bytes."""
    digits = "".join(format(value, f"0{bits}b") for value in row)
    digits += "0" * (-len(digits) % 8)
    return int(digits, 2).to_bytes(len(digits) // 8, "big")


def png(classes: np.ndarray, bits: int, palette: bool = False) -> bytes:
    """A PNG file of grey levels, or of places in a palette, with any number of bits."""
    header = struct.pack(">IIBBBBB", *classes.shape[::-1], bits, 3 if palette else 0, 0, 0, 0)
    pixels = b"".join(b"\0" + packed(row, bits) for row in classes)
    parts = {b"IHDR": header, b"PLTE": bytes(range(12)), b"IDAT": zlib.compress(pixels), b"IEND": b""}
    if not palette:
        del parts[b"PLTE"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
        for name, part in parts.items()
    )


def encoded(picture: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def pgm(classes: np.ndarray, largest: int, plain: bool = False) -> bytes:
    height, width = classes.shape
    if plain:
        return f"P2 {width} {height} {largest}\n{' '.join(map(str, classes.flat))}\n".encode()
    return b"P5 %d %d %d\n" % (width, height, largest) + classes.astype(">u2" if largest > 255 else "u1").tobytes()


def tiff(classes: np.ndarray, bits: int, white_is_zero: bool = False) -> bytes:
    """A TIFF file of grey levels with any number of bits."""
    pixels = b"".join(packed(row, bits) for row in classes)
    height, width = classes.shape
    photometric = 0 if white_is_zero else 1
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    pixels += bytes(len(pixels) % 2)
    return struct.pack("<2sHI", b"II", 42, 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


def bmp(classes: np.ndarray, bits: int, greys: Iterable[int]) -> bytes:
    """A BMP file with a palette of greys."""
    pixels = b"".join(packed(row, bits).ljust(4, b"\0") for row in classes[::-1])
    palette = b"".join(bytes([grey, grey, grey, 0]) for grey in greys)
    height, width = classes.shape
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 0, len(pixels), 0, 0, len(palette) // 4, 0)
    start = 14 + len(info) + len(palette)
    return struct.pack("<2sIHHI", b"BM", start + len(pixels), 0, 0, start) + info + palette + pixels


GREY = Image.fromarray(CLASSES.astype(np.uint8))
COLOURED = GREY.convert("P")


@pytest.mark.parametrize(
    ("content", "classes"),
    [
        (png(TWO, 1), TWO),
        *((png(CLASSES, bits), CLASSES) for bits in (2, 4, 8, 16)),
        (png(TWO, 1, palette=True), TWO),
        *((png(CLASSES, bits, palette=True), CLASSES) for bits in (2, 4, 8)),
        (png(CLASSES * 5, 4), CLASSES * 5),
        (encoded(Image.fromarray((CLASSES * 300).astype(np.uint16)), "PNG"), CLASSES * 300),
        (encoded(Image.fromarray((CLASSES * 300).astype(np.uint16)), "TIFF"), CLASSES * 300),
        (encoded(Image.fromarray((CLASSES * 70_000).astype(np.int32)), "TIFF"), CLASSES * 70_000),
        (encoded(Image.fromarray(TWO > 0), "TIFF"), TWO),
        *((encoded(picture, format), CLASSES) for picture in (GREY, COLOURED) for format in ("BMP", "GIF", "TIFF")),
        (encoded(GREY, "TIFF", compression="tiff_lzw"), CLASSES),
        *((tiff(CLASSES, bits), CLASSES) for bits in (2, 4, 8)),
        (bmp(CLASSES, 4, range(0, 256, 17)), CLASSES),
        (bmp(CLASSES, 8, range(4)), CLASSES),
        *((pgm(CLASSES, largest, plain), CLASSES) for largest in (3, 15, 255, 1000, 65535) for plain in (False, True)),
        (pgm(CLASSES * 300, 1000), CLASSES * 300),
    ],
    ids=lambda value: value[:4].hex() if isinstance(value, bytes) else None,
)
def test_masks_of_every_mode_are_read_as_they_were_written(content: bytes, classes: np.ndarray, root: Path) -> None:
    path = root / "mask"
    path.write_bytes(content)
    assert read_pair(root / "train" / "a.png", path)[1].tolist() == classes.tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (encoded(GREY, "JPEG"), "in a format that keeps every value, such as PNG; got JPEG"),
        (encoded(GREY, "TIFF", compression="jpeg"), "in a format that keeps every value, such as PNG; got TIFF"),
        (encoded(GREY.convert("RGB"), "PNG"), "one channel, the classes; got 3: R, G, B"),
        (encoded(GREY.convert("RGBA"), "PNG"), "one channel, the classes; got 4: R, G, B, A"),
        (encoded(GREY.convert("LA"), "PNG"), "one channel, the classes; got 2: L, A"),
        (encoded(GREY.convert("CMYK"), "TIFF"), "one channel, the classes; got 4: C, M, Y, K"),
        (encoded(GREY.convert("F"), "TIFF"), "one channel, the classes; got floating-point numbers"),
        (tiff(CLASSES, 4, white_is_zero=True), "store classes; got a picture that stores white as 0"),
        (b"P4 3 2\n\x40\xa0", "store classes; got a picture that stores white as 0"),
        (bmp(CLASSES, 4, range(16)), "is a grey BMP file of other than 8 bits"),
        (b"", "cannot read the image"),
    ],
    ids=lambda value: value[:4].hex() if isinstance(value, bytes) else None,
)
def test_masks_that_may_hold_other_values_are_refused(content: bytes, message: str, root: Path) -> None:
    path = root / "mask"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{message}|{message}.*{path}") as mistake:
        read_pair(root / "train" / "a.png", path)
    assert str(path) in str(mistake.value)


@pytest.mark.parametrize(
    ("content", "pixel"),
    [
        (encoded(Image.new("1", (3, 2), 1), "PNG"), (255, 255, 255)),
        (png(np.full((2, 3), 5), 4), (85, 85, 85)),
        (encoded(Image.new("LA", (3, 2), (90, 255)), "PNG"), (90, 90, 90)),
        (encoded(Image.new("RGBA", (3, 2), (1, 2, 3, 255)), "PNG"), (1, 2, 3)),
        (encoded(Image.new("RGB", (3, 2), (1, 2, 3)).quantize(), "PNG"), (1, 2, 3)),
        (encoded(Image.new("CMYK", (3, 2), (255, 0, 0, 0)), "TIFF"), (0, 255, 255)),
        (pgm(np.full((2, 3), 5), 15), (85, 85, 85)),
        (encoded(Image.new("RGB", (3, 2), (1, 2, 3)), "WEBP", lossless=True), (1, 2, 3)),
        (encoded(Image.new("RGB", (3, 2), (128, 128, 128)), "JPEG"), (128, 128, 128)),
    ],
    ids=lambda value: value[:4].hex() if isinstance(value, bytes) else None,
)
def test_images_of_every_mode_are_read_as_they_look(content: bytes, pixel: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(content)
    image = read_image(tmp_path / "image")
    assert (image.size, image.getpixel((2, 1))) == ((3, 2), pixel)


@pytest.mark.parametrize(("mode", "format"), [("I;16", "PNG"), ("I", "TIFF"), ("F", "TIFF"), ("LAB", "TIFF")])
def test_images_that_are_not_of_8_bits_are_refused(mode: str, format: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    Image.new(mode, (3, 2)).save(path, format)
    for read in (read_image, partial(read_photo, size=8)):
        with pytest.raises(ValueError, match=rf"^{path} must have 8 bits a channel; .* Pillow's mode {mode}$"):
            read(path)


def turn(picture: Image.Image, orientation: int) -> tuple[bytes, Image.Image]:
    """A PNG file of a picture with a camera's turn, and the picture as it is shown."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(picture, "PNG", exif=exif)
    return content, ImageOps.exif_transpose(Image.open(io.BytesIO(content)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_as_its_image_is(orientation: int, root: Path) -> None:
    classes = (np.arange(6).reshape(2, 3) % 5).astype(np.uint8)
    stored = Image.fromarray(classes)
    image, mask = root / "train" / "a.png", root / "trainannot" / "a.png"
    content, shown = turn(stored, orientation)
    image.write_bytes(content)
    masks = {"own": content, "stored": encoded(stored, "PNG"), "shown": encoded(shown, "PNG")}
    for kind, written in masks.items():
        mask.write_bytes(written)
        if kind != "own" and orientation in (2, 3, 4):  # either size is the same
            with pytest.raises(
                ValueError, match=rf"a.png is turned by its EXIF orientation {orientation} and .* upright$"
            ):
                camvid(root, "train")[0]
        else:
            pixels, found = camvid(root, "train")[0]
            assert found.tolist() == pixels[0].tolist() == np.asarray(shown).tolist()
    tiff = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tiff, "TIFF", exif=exif)
    mask.write_bytes(tiff.getvalue())
    if orientation > 1:
        with pytest.raises(ValueError, match=r"trainannot/a.png is a TIFF file whose orientation is not 1"):
            camvid(root, "train")[0]


def test_a_turned_square_image_and_a_mask_without_a_turn_are_refused(root: Path) -> None:
    square = Image.fromarray(np.zeros((4, 4), np.uint8))
    (root / "train" / "a.png").write_bytes(turn(square, 6)[0])
    (root / "trainannot" / "a.png").write_bytes(encoded(square, "PNG"))
    with pytest.raises(ValueError, match=r"it is not known whether the mask is turned: save the image upright$"):
        camvid(root, "train")[0]


@pytest.mark.parametrize(("label", "ignore"), [(255, 11), (-1, 255), (300, 11)])
def test_labels_that_are_no_class_are_named(label: int, ignore: int, root: Path) -> None:
    mask = root / "mask.tif"
    Image.fromarray(np.full((2, 3), label, np.int32)).save(mask)
    dataset = Segmentation([(root / "train" / "a.png", mask)], ("a", "b"), ((0, 0, 0),) * 2, ignore)
    with pytest.raises(ValueError, match=rf"mask.tif must have labels from 0 to 1, or {ignore} where .*; got {label}$"):
        dataset[0]


def test_more_classes_than_a_byte_holds_are_refused() -> None:
    with pytest.raises(ValueError, match="there must be at most 255 classes; got 256"):
        Segmentation([], ("a",) * 256, ())


def write_label_out_of_range(root: Path) -> None:
    Image.fromarray(np.full((2, 3), 12, np.uint8)).save(root / "trainannot" / "a.png")


def write_other_size(root: Path) -> None:
    Image.fromarray(np.zeros((2, 4), np.uint8)).save(root / "trainannot" / "a.png")


def write_colours(root: Path) -> None:
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(root / "trainannot" / "a.png")


def truncate(root: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(root / "train" / "a.png")
    whole = (root / "train" / "a.png").read_bytes()
    (root / "train" / "a.png").write_bytes(whole[: len(whole) // 2])


def write_16_bits(root: Path) -> None:
    Image.fromarray(np.zeros((2, 3), np.uint16)).save(root / "train" / "a.png")


def cut_header(root: Path) -> None:
    content = bytearray((root / "train" / "a.png").read_bytes())
    content[11] = 1  # the length of the first chunk
    (root / "train" / "a.png").write_bytes(content)


def write_text(root: Path) -> None:
    (root / "train" / "a.png").write_text("no picture")


def delete_mask(root: Path) -> None:
    (root / "trainannot" / "a.png").unlink()


def delete_images(root: Path) -> None:
    (root / "train" / "a.png").unlink()


def delete_folder(root: Path) -> None:
    delete_mask(root)
    (root / "trainannot").rmdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (write_label_out_of_range, r"trainannot/a.png must have labels from 0 to 10, or 11 where .*; got 12"),
        (write_other_size, r"trainannot/a.png must have the size of its image, 3×2; got 4×2"),
        (write_colours, r"trainannot/a.png must have one channel, the classes; got 3"),
        (truncate, r"cannot read .*train/a.png: .*truncated"),
        (write_16_bits, r"train/a.png must have 8 bits a channel; got a picture of Pillow's mode I;16"),
        (write_text, r"cannot read the image .*train/a.png: it is no image Pillow reads"),
        (cut_header, r"cannot read the image .*train/a.png: Truncated IHDR chunk"),
        (delete_mask, r"train/a.png needs its mask .*trainannot/a.png, which does not exist"),
        (delete_images, r"CamVid needs images in .*train; got none"),
        (delete_folder, r"CamVid needs the folder .*trainannot, which does not exist"),
    ],
)
def test_broken_files_are_named(root: Path, spoil, message: str) -> None:
    spoil(root)
    with pytest.raises(ValueError, match=message):
        camvid(root, "train")[0]


def test_a_split_that_camvid_has_not_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="split must be one of"):
        camvid(root, "training")


def test_voc_joins_its_own_masks_and_those_of_sbd(tmp_path: Path) -> None:
    own, sbd = tmp_path / "VOCdevkit" / "VOC2012", tmp_path / "sbd"
    for folder in (
        own / "ImageSets/Segmentation",
        own / "JPEGImages",
        own / "SegmentationClass",
        sbd / "img",
        sbd / "cls",
    ):
        folder.mkdir(parents=True)
    for split, names in (("train", "a"), ("val", "b")):
        (own / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(names)
    for split, names in (("train", "a\nc"), ("val", "b\nd")):
        (sbd / f"{split}.txt").write_text(names)
    mask = np.array([[0, 20, 255]], np.uint8)
    for name in "abcd":
        image = Image.fromarray(np.zeros((1, 3, 3), np.uint8))
        image.save((own / "JPEGImages" if name in "ab" else sbd / "img") / f"{name}.jpg")
        if name in "ab":
            Image.fromarray(mask).save(own / "SegmentationClass" / f"{name}.png")
        else:
            ground_truth = np.zeros((1,), [("Segmentation", object)])
            ground_truth[0]["Segmentation"] = mask
            savemat(sbd / "cls" / f"{name}.mat", {"GTcls": ground_truth})
    training = voc(tmp_path, "train")
    assert [image.stem for image, _ in training.pairs] == ["a", "c", "d"]
    for dataset in (training, voc(tmp_path, "val")):
        for _, classes in dataset:
            assert classes.tolist() == [[0, 20, IGNORE]]
    with pytest.raises(ValueError, match=r"PASCAL VOC 2012 is not under .* --download"):
        voc(tmp_path / "VOCdevkit", "val")
    with pytest.raises(ValueError, match="split must be 'train' or 'val'"):
        voc(tmp_path, "test")
    assert len(VOC_NAMES) == 21
    assert (voc_colour(1), voc_colour(15)) == ((128, 0, 0), (192, 128, 128))  # aeroplane and person


def write_own(root: Path, names: str, split: str = "") -> None:
    for folder in ("images", "masks"):
        (root / folder / split).mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(root / "images" / split / f"{name}.jpg")
        Image.fromarray(np.full((2, 3), i % 3, np.uint8)).save(root / "masks" / split / f"{name}.png")


def test_every_fifth_pair_of_ones_own_is_for_validation(tmp_path: Path) -> None:
    write_own(tmp_path, "abcdefghijk")
    splits = {split: own_folder(tmp_path, split, ("sky", "road", "tree")) for split in ("train", "val")}
    stems = {split: "".join(image.stem for image, _ in dataset.pairs) for split, dataset in splits.items()}
    assert stems == {"train": "abcdfghik", "val": "ej"}
    assert splits["val"][0][1].unique().tolist() == [4 % 3]
    assert len(set(splits["val"].colours)) == 3
    assert len(set(own_folder(tmp_path, "val", tuple(map(str, range(60)))).colours)) == 60
    with pytest.raises(ValueError, match=r"must have the folders of its splits for --split test, such as .*images/val"):
        own_folder(tmp_path, "test", ("sky",))
    with pytest.raises(ValueError, match=r"^split must be one of \('train', 'val', 'test'\); got 'validation'$"):
        own_folder(tmp_path, "validation", ("sky",))


def test_splits_of_ones_own_are_folders_if_there_is_one_for_validation(tmp_path: Path) -> None:
    splits = {"train": "ab", "val": "c", "test": "d"}
    for split, names in splits.items():
        write_own(tmp_path, names, split)
    for split, names in splits.items():
        dataset = own_folder(tmp_path, split, ("sky", "road", "tree"), size=(4, 6))
        assert "".join(image.stem for image, _ in dataset.pairs) == names
        assert dataset[0][0].shape == (3, 4, 6)
    (tmp_path / "images" / "train" / "b.jpg").rename(tmp_path / "images" / "train" / "a.jpeg")
    with pytest.raises(ValueError, match=r"train/a.png must be the mask of one image; got a.jpeg and a.jpg$"):
        own_folder(tmp_path, "train", ("sky",))
    (tmp_path / "images" / "train" / "a.jpeg").unlink()
    with pytest.raises(ValueError, match=r"masks/train/b.png needs its image, a JPEG or PNG in .*images/train, which"):
        own_folder(tmp_path, "train", ("sky",))
    (tmp_path / "masks" / "val" / "c.png").unlink()
    with pytest.raises(ValueError, match=r"images/val/c.jpg needs its mask .*masks/val/c.png, which does not exist"):
        own_folder(tmp_path, "val", ("sky",))


def test_too_few_images_of_ones_own_are_refused(tmp_path: Path) -> None:
    write_own(tmp_path, "abcd")
    with pytest.raises(ValueError, match="must have at least 5 images; got 4"):
        own_folder(tmp_path, "train", ("sky",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must name 1 to 255 classes, a line each; got 0"),
        ("\n".join(map(str, range(256))).encode(), "must name 1 to 255 classes, a line each; got 256"),
        (b"sky\nroad\nsky\n", "must name each class once; got 'sky' 2 times"),
        (b"sky\n \nroad\n", "must name a class in each line; got an empty one, line 2"),
        (b"\xff\xfe", "cannot read the classes .*: it is no text in UTF-8"),
        (None, "cannot read the classes .*: No such file"),
    ],
)
def test_names_that_are_none_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "classes.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_names(path)


def test_names_are_the_lines_and_empty_ones_may_follow(tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-8-sig"):  # Windows' Notepad may write a mark before the text
        (tmp_path / "classes.txt").write_text("sky\n traffic light \nroad\n\n \n", encoding)
        assert read_names(tmp_path / "classes.txt") == ("sky", "traffic light", "road")


def test_augmentation_moves_image_and_mask_together() -> None:
    torch.manual_seed(0)
    classes = torch.randint(0, 9, (6, 8)).repeat_interleave(8, 0).repeat_interleave(8, 1)
    sample = tv_tensors.Image((20 * classes).to(torch.uint8).expand(3, -1, -1)), tv_tensors.Mask(classes)
    mean, std = 0.485, 0.229
    padded = 0
    for _ in range(20):
        image, mask = augmentation((40, 72))(*sample)
        assert image.shape == (3, 40, 72)
        seen = ((image[0] * std + mean) * 255 / 20 - mask).abs()[mask != IGNORE]
        assert (seen < 0.1).float().mean() > 0.5  # all but the pixels that scaling mixed
        padded += bool((mask == IGNORE).any())
        assert image[:, mask == IGNORE].abs().max() < 0.02 if (mask == IGNORE).any() else True
    assert 0 < padded < 20
