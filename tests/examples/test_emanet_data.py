"""The data sets of EMANet's example: what they give, and what they say of broken files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import tv_tensors

from examples._common.samples import IGNORE
from examples.emanet.data import VOC_NAMES, augmentation, camvid, read_picture, voc, voc_colour

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
    assert read_picture(tmp_path / "photo.jpg", "RGB").shape == (3, 30, 20)


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
        (write_text, r"train/a.png is no picture that Pillow can read"),
        (delete_mask, r"train/a.png needs its mask .*trainannot/a.png, which does not exist"),
        (delete_images, r"CamVid needs images in .*train; got none"),
        (delete_folder, r"CamVid needs the folder .*trainannot, which does not exist"),
    ],
)
def test_broken_files_are_named(root: Path, spoil, message: str) -> None:
    spoil(root)
    with pytest.raises(ValueError, match=message):
        camvid(root, "train")[0]
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
