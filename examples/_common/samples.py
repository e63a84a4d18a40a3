"""The samples that a segmentation network learns from and is scored on: normalised, drawn at random, in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2

IGNORE = 255
"""The label of pixels that count neither in the loss nor in the score."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Sample = tuple[tv_tensors.Image, tv_tensors.Mask]
"""An image (3, H, W), uint8, and its classes (H, W), int64."""
Colours = tuple[tuple[int, int, int], ...]
"""Of each class in pictures, RGB from 0 to 255."""


class Samples(Protocol):
    """A data set of samples that names their classes."""

    names: tuple[str, ...]
    colours: Colours

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def fingerprint(self) -> str:
        """What it holds, in a few words. A run goes on only with the same."""
        ...


normalisation = v2.Compose(
    [
        v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
        v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
)
"""From 0–255 to what torchvision's backbones expect; masks pass."""


class Normalised(Dataset[tuple[Tensor, Tensor]]):
    """Samples as they are, with the image normalised."""

    def __init__(self, dataset: Samples) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return normalisation(*self.dataset[index])


class Drawn(Dataset[tuple[Tensor, Tensor]]):
    """Samples after random transforms that depend on (seed, epoch, index) alone: not on workers, order or resuming.

    Its keys are pairs (epoch, index).
    """

    def __init__(self, dataset: Samples, transform: v2.Transform, seed: int) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        sample = self.dataset[index]
        with torch.random.fork_rng(devices=[]):
            seed_everything(self.seed, epoch, index)
            return self.transform(*sample)


class Batches(Sampler[list[tuple[int, int]]]):
    """The keys of the samples of each step, from step ``first`` on: every epoch in an order of its own.

    Each rank gets its share of the batch; what is left of an epoch after its last full batch is left out.

    Raises:
        ValueError: for a batch larger than the data set, or one that ranks cannot share evenly.
    """

    def __init__(
        self, length: int, batch: int, first: int, last: int, seed: int, rank: int = 0, ranks: int = 1
    ) -> None:
        if not 1 <= batch <= length:
            raise ValueError(f"the batch must be from 1 to {length}, the number of samples; got {batch}")
        if batch % ranks:
            raise ValueError(f"the batch must be a multiple of the {ranks} processes that share it; got {batch}")
        self.length, self.batch, self.first, self.last = length, batch, first, last
        self.seed, self.rank, self.ranks = seed, rank, ranks

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first, self.last):
            epoch, batch = divmod(step, self.length // self.batch)
            order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
            chosen = order[batch * self.batch : (batch + 1) * self.batch]
            yield [(epoch, int(index)) for index in chosen[self.rank :: self.ranks]]


def loaded(batches: Iterable[list[Tensor]]) -> Iterator[list[Tensor]]:
    """The batches of a DataLoader, with the sentence of a worker's ValueError alone: PyTorch puts a traceback there."""
    try:
        yield from batches
    except ValueError as error:
        _, of_a_worker, sentence = str(error).rpartition("\nValueError: ")
        if not of_a_worker:
            raise
        # The frames hold the workers: those that only the garbage collector finds are waited for, 5 s each.
        raise ValueError(sentence.rstrip()) from error.with_traceback(None)


def seed_everything(*numbers: int) -> None:
    """Seeds PyTorch's generators from several numbers."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))
