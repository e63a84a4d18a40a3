"""EMANet's data: CamVid's folders, PASCAL VOC through torchvision, your own, and the published augmentation."""

from __future__ import annotations

import argparse
import hashlib
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.datasets import SBDataset, VOCSegmentation
from torchvision.transforms import v2
from tqdm import tqdm

from examples._common.picture_files import read_pair
from examples._common.samples import IGNORE, IMAGENET_MEAN, Colours, Sample, normalisation

SPLITS = ("train", "val", "test")


class Segmentation(Dataset[Sample]):
    """Images and masks in pairs of files.

    Args:
        pairs: the paths of an image and of its mask, a picture whose values are the classes.
        names: of the classes.
        colours: of the classes in pictures, RGB from 0 to 255.
        ignore: the value of the masks that is no class; it becomes ``IGNORE``.
        size: (H, W) that images and masks are scaled to; None leaves theirs.

    Raises:
        ValueError: for more classes than labels below ``IGNORE``; if the size is of nothing.
    """

    def __init__(
        self,
        pairs: list[tuple[Path, Path]],
        names: tuple[str, ...],
        colours: Colours,
        ignore: int = IGNORE,
        size: tuple[int, int] | None = None,
    ) -> None:
        if len(names) > IGNORE:
            raise ValueError(f"there must be at most {IGNORE} classes; got {len(names)}")
        if size is not None and min(size) < 1:
            raise ValueError(f"size must be a height and a width of at least 1; got {tuple(size)}")
        self.pairs = pairs
        self.names = names
        self.colours = colours
        self.ignore = ignore
        self.size = size

    def __len__(self) -> int:
        return len(self.pairs)

    def fingerprint(self) -> str:
        """The number of samples, and a digest of the contents of their files, in order, and of how they are read.

        Raises:
            ValueError: with the file's name, for one that cannot be read.
        """
        digest = hashlib.sha256(repr((self.ignore, self.size)).encode())
        for path in chain.from_iterable(self.pairs):
            try:
                content = path.read_bytes()
            except OSError as error:
                raise ValueError(f"cannot read {path}: {error.strerror}") from None
            digest.update(hashlib.sha256(content).digest())
        return f"{len(self)} samples, SHA-256 {digest.hexdigest()[:16]}"

    def check(self, what: str) -> None:
        """Reads every sample once, so that a broken one is known before the training. Raises as reading it does."""
        for index in tqdm(range(len(self)), f"reading {what}", unit="image", leave=False):
            self[index]

    def __getitem__(self, index: int) -> Sample:
        """Raises ValueError, with the file's name, for one that is broken, of another size, or with other labels."""
        image_path, mask_path = self.pairs[index]
        image, mask = read_pair(image_path, mask_path)
        image, mask = tv_tensors.Image(image), torch.from_numpy(mask)
        is_none = mask == self.ignore
        wrong = mask[~is_none & ((mask < 0) | (mask >= len(self.names)))]
        if len(wrong):
            raise ValueError(
                f"{mask_path} must have labels from 0 to {len(self.names) - 1}, or {self.ignore} where there is none; "
                f"got {int(wrong[0])}"
            )
        mask = tv_tensors.Mask(mask.masked_fill(is_none, IGNORE))
        if self.size is None:
            return image, mask
        return v2.functional.resize(image, self.size, antialias=True), v2.functional.resize(mask, self.size)


CAMVID_NAMES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "cyclist",
)
CAMVID_COLOURS = (
    (86, 180, 233),
    (213, 94, 0),
    (240, 228, 66),
    (128, 128, 128),
    (204, 121, 167),
    (0, 158, 115),
    (230, 159, 0),
    (102, 51, 0),
    (0, 114, 178),
    (255, 255, 255),
    (90, 0, 90),
)
"""Not the data set's own: Okabe and Ito's eight and three shades more, which the colour-blind tell apart too."""


def camvid(root: Path, split: str, size: tuple[int, int] | None = None) -> Segmentation:
    """CamVid (Brostow et al., 2009) with the 11 classes of SegNet: ``root/train/X.jpg`` with ``root/trainannot/X.png``.

    Args:
        root: the folder of the splits.
        split: ``"train"``, ``"val"`` or ``"test"``.
        size: (H, W) that images and masks are scaled to; None leaves theirs.

    Raises:
        ValueError: if a folder or a mask is missing, there is no image, or the size is of nothing.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}; got {split!r}")
    pairs = find_pairs(root / split, root / f"{split}annot", "CamVid")
    return Segmentation(pairs, CAMVID_NAMES, CAMVID_COLOURS, ignore=11, size=size)


def find_pairs(images: Path, masks: Path, data: str) -> list[tuple[Path, Path]]:
    """Every image of a folder, by name, and its mask in another: ``X.jpg`` and ``X.png``.

    Raises:
        ValueError: with the name of the data, if a folder, a mask or an image is missing, there is none at all, or two
            images have one mask.
    """
    for folder in (images, masks):
        if not folder.is_dir():
            raise ValueError(f"{data} needs the folder {folder}, which does not exist")
    paths = sorted(path for path in images.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    pairs = [(path, masks / f"{path.stem}.png") for path in paths if not path.name.startswith(".")]
    if not pairs:
        raise ValueError(f"{data} needs images in {images}; got none")
    image_of: dict[Path, Path] = {}
    for image, mask in pairs:
        if not mask.is_file():
            raise ValueError(f"{image} needs its mask {mask}, which does not exist")
        if mask in image_of:
            raise ValueError(f"{mask} must be the mask of one image; got {image_of[mask].name} and {image.name}")
        image_of[mask] = image
    for mask in sorted(masks.glob("[!.]*.png")):
        if mask not in image_of:
            raise ValueError(f"{mask} needs its image, a JPEG or PNG in {images}, which does not exist")
    return pairs


VOC_NAMES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "dining table",
    "dog",
    "horse",
    "motorbike",
    "person",
    "potted plant",
    "sheep",
    "sofa",
    "train",
    "tv monitor",
)


def voc_colour(label: int) -> tuple[int, int, int]:
    """VOC's own colour of a label: from the lowest, its bits are red's, green's and blue's highest, then their next."""
    return tuple(sum((label >> 3 * bit + channel & 1) << 7 - bit for bit in range(3)) for channel in range(3))


def voc(root: Path, split: str, download: bool = False) -> Segmentation:
    """PASCAL VOC 2012 through torchvision; ``"train"`` is the usual set of 10,582 images, most with SBD's masks.

    Args:
        root: where torchvision keeps them: ``VOCdevkit`` and, for training, ``img`` and ``cls`` of SBD in ``sbd``.
        split: ``"train"`` or ``"val"``.
        download: whether to fetch what is missing.

    Raises:
        ValueError: for another split, or if the data is not under ``root``.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be 'train' or 'val'; got {split!r}")
    try:
        own = VOCSegmentation(root, image_set=split, download=download)
        other = VOCSegmentation(root, image_set="val")
        pairs = dict(zip(own.images, own.masks, strict=True))
        if split == "train":
            known = {Path(path).stem for path in (*own.images, *other.images)}
            for half in ("train", "val"):
                more = SBDataset(root / "sbd", half, "segmentation", download and not (root / "sbd" / "cls").is_dir())
                found = zip(more.images, more.masks, strict=True)
                pairs |= {image: mask for image, mask in found if Path(image).stem not in known}
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"PASCAL VOC 2012 is not under {root}: {str(error).replace('download=True', '--download')}"
        ) from None
    return Segmentation(
        [(Path(image), Path(mask)) for image, mask in pairs.items()],
        VOC_NAMES,
        tuple(map(voc_colour, range(len(VOC_NAMES)))),
    )


VALIDATION_EVERY = 5
"""Of one's own pairs without folders of splits, by name: the last of each five is for validation."""


def own_folder(root: Path, split: str, names: tuple[str, ...], size: tuple[int, int] | None = None) -> Segmentation:
    """Your own data: ``root/images/X.jpg`` with ``root/masks/X.png``, whose values are the indices of the names.

    If there is a folder ``root/images/val``, the splits are folders: ``root/images/train/X.jpg`` with
    ``root/masks/train/X.png``. If not, every fifth pair is for validation, and the others are for training.

    Args:
        root: the folder with ``images`` and ``masks``.
        split: ``"train"``, ``"val"``, or ``"test"`` if there is a folder of it.
        names: of the classes. The value 255 in a mask is no class.
        size: (H, W) that images and masks are scaled to; None leaves theirs.

    Raises:
        ValueError: for another split; if a folder or a mask is missing, or there is no image; if there are too few to
            have both splits.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}; got {split!r}")
    colours = (*CAMVID_COLOURS, *map(voc_colour, range(len(CAMVID_COLOURS), len(names))))[: len(names)]
    if (root / "images" / "val").is_dir():
        pairs = find_pairs(root / "images" / split, root / "masks" / split, "--data folder")
    elif split == "test":
        raise ValueError(f"{root} must have the folders of its splits for --split test, such as {root / 'images/val'}")
    else:
        pairs = find_pairs(root / "images", root / "masks", "--data folder")
        if len(pairs) < VALIDATION_EVERY:
            raise ValueError(f"{root} must have at least {VALIDATION_EVERY} images; got {len(pairs)}")
        last = VALIDATION_EVERY - 1
        pairs = [pair for i, pair in enumerate(pairs) if (i % VALIDATION_EVERY == last) == (split == "val")]
    return Segmentation(pairs, names, colours, size=size)


def read_names(path: Path) -> tuple[str, ...]:
    """The names of the classes, a line each, as a label is the number of its line, the first one 0.

    Raises:
        ValueError: if there are none or too many, one is there twice, or a line between them is empty.
    """
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise ValueError(f"cannot read the classes {path}: {reason}") from None
    if "" in names:
        raise ValueError(f"{path} must name a class in each line; got an empty one, line {names.index('') + 1}")
    if not 1 <= len(names) <= IGNORE:
        raise ValueError(f"{path} must name 1 to {IGNORE} classes, a line each; got {len(names)}")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path} must name each class once; got {twice[0]!r} {names.count(twice[0])} times")
    return names


class RandomScale(v2.Transform):
    """Scales images and masks by a factor that is uniform between two."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        factor = self.low + (self.high - self.low) * torch.rand(()).item()
        return {"size": [max(1, round(side * factor)) for side in v2.query_size(flat_inputs)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return v2.functional.resize(inpt, **params, antialias=True)


def augmentation(crop: tuple[int, int], scales: tuple[float, float] = (0.5, 2.0)) -> v2.Compose:
    """The published augmentation of samples: scale, crop (height, width), flip; then :data:`normalisation`.

    Raises:
        ValueError: for a crop of nothing.
    """
    if min(crop) < 1:
        raise ValueError(f"crop must be a height and a width of at least 1; got {tuple(crop)}")
    fill = {tv_tensors.Image: tuple(round(255 * mean) for mean in IMAGENET_MEAN), tv_tensors.Mask: IGNORE}
    random_crop = v2.RandomCrop(crop, pad_if_needed=True, fill=fill)
    return v2.Compose([RandomScale(*scales), random_crop, v2.RandomHorizontalFlip(), normalisation])


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """What a command needs to be told for :func:`open_data`."""
    parser.add_argument(
        "--data",
        choices=("camvid", "voc", "folder"),
        required=True,
        help="the data set; folder: your own, images/ and masks/ in --root, and its --classes. Every fifth pair, by "
        "name, is for validation, unless there are images/train, images/val, masks/train, masks/val",
    )
    parser.add_argument("--root", type=Path, required=True, help="its folder")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="names of the folder's classes, a line each")
    parser.add_argument("--download", action="store_true", help="fetch PASCAL VOC into the folder")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="scale the images (default: as they are)"
    )


def open_data(args: argparse.Namespace, split: str) -> Segmentation:
    """The split of the data set that the arguments name. Raises ValueError if it is not there."""
    if (args.classes is None) == (args.data == "folder"):
        raise ValueError(
            f"--classes must be given with --data folder, and only with it; got --data {args.data} and --classes "
            f"{args.classes}"
        )
    if args.data == "folder":
        return own_folder(args.root, split, read_names(args.classes), args.size)
    if args.data == "camvid":
        return camvid(args.root, split, args.size)
    if args.size is not None:
        raise ValueError(f"--size must not be given with --data voc; got --size {' '.join(map(str, args.size))}")
    return voc(args.root, split, args.download)
