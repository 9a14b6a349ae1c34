"""The batches of a run: the order of the images, and the loaders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..core.errors import ConfigError
from ..core.interrupts import leave_to_parent

if TYPE_CHECKING:
    from .data import Images

__all__ = ["Sample", "Stream", "evaluation_loader", "training_loader"]

Sample = tuple[Tensor, dict[str, Any]]
"""An image and its target."""


class Stream(Sampler[list[tuple[int, int]]]):
    """Batches of (index, seed) for a whole run: permutation after permutation, decided by the seed alone.

    A resumed run sets ``start`` and sees exactly the batches that it would have seen.

    Args:
        length: the number of images of the dataset.
        batch_size: images a step, of all processes together.
        batches: steps of the whole run.
        seed: decides order and augmentation.
        rank, world: this process takes every ``world``-th item of each batch.

    Raises:
        ConfigError: the processes cannot share a batch equally.
    """

    def __init__(self, length: int, *, batch_size: int, batches: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if batch_size % world:
            raise ConfigError(
                "batch_size",
                batch_size,
                allowed=f"a multiple of the {world} processes",
                hint="change {batch_size} or {devices}",
            )
        self.length, self.batch_size, self.batches, self.seed = length, batch_size, batches, seed
        self.rank, self.world, self.start = rank, world, 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, epoch_of = torch.empty(0), -1
        for batch in range(self.start, self.batches):
            items = []
            for place in range(batch * self.batch_size + self.rank, (batch + 1) * self.batch_size, self.world):
                epoch, within = divmod(place, self.length)
                if epoch != epoch_of:
                    generator = torch.Generator().manual_seed(_mixed(self.seed, epoch))
                    order, epoch_of = torch.randperm(self.length, generator=generator), epoch
                items.append((int(order[within]), _mixed(self.seed, place, 1)))
            yield items


def _mixed(*numbers: int) -> int:
    """Mix several numbers into one of 63 bits, the same on every machine."""
    mixed = 0
    for number in numbers:
        mixed = (mixed ^ (number + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed ^= mixed >> 31
    return mixed % 2**63


def _collate(samples: list[Sample]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    return [image for image, _ in samples], [target for _, target in samples]


def training_loader(dataset: Dataset[Sample], stream: Stream, *, workers: int) -> DataLoader[Sample]:
    """Build the loader of a run's batches, in the order of the stream."""
    return DataLoader(
        dataset,
        batch_sampler=stream,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=leave_to_parent,
        generator=torch.Generator(),  # iterating must not draw from the run's generator
    )


def evaluation_loader(
    dataset: Images, *, batch_size: int, workers: int, rank: int = 0, world: int = 1
) -> DataLoader[Sample]:
    """Build the loader of this process's share of the images, each image once."""
    share = torch.utils.data.Subset(dataset, range(rank, len(dataset), world))
    return DataLoader(
        share,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=leave_to_parent,
        generator=torch.Generator(),
    )
