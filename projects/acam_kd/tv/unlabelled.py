"""The second loader of a run: images without labels, for the method's losses, or with the teacher's own labels."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.tv_tensors import Mask

from ..core import ConfigError, Distillation
from ..data.unlabelled import check_images, find_images, refuse_shared
from .batches import Sample, Stream, training_loader
from .data import Images, read_image
from .models import needs_pairs
from .run import Settings
from .segmentation import Segmentor

__all__ = ["Several", "UnlabelledBatches", "UnlabelledImages", "check_unlabelled", "load_unlabelled"]

SEED = 1_000_003
"""Added to the run's seed: the order and the flips of the two loaders are to be independent."""
OPTIONS = ("unlabelled_batch", "unlabelled_weight", "unlabelled_start", "unlabelled_keep_norms", "pseudo_labels")

Batch = tuple[list[Tensor], list[dict[str, Any]]]
"""Images and targets."""


def check_unlabelled(settings: Settings, *, world: int = 1) -> None:
    """Check the options of unlabelled images against each other.

    Args:
        settings: ``scaled``.
        world: the number of processes that share a batch.

    Raises:
        ConfigError: one cannot be used.
    """
    if not settings.unlabelled:
        for name in OPTIONS:
            if getattr(settings, name) != Settings.__dataclass_fields__[name].default:
                raise ConfigError(
                    name, getattr(settings, name), "none without unlabelled images", "give {unlabelled}"
                )  # fmt: skip
        return
    weight, start, threshold = settings.unlabelled_weight, settings.unlabelled_start, settings.pseudo_labels
    if not 0 <= weight < math.inf:
        raise ConfigError("unlabelled_weight", weight, ">= 0 and finite")
    if settings.unlabelled_batch % world:
        raise ConfigError("unlabelled_batch", settings.unlabelled_batch, f"a multiple of the {world} processes")
    if start >= settings.iterations:
        raise ConfigError("unlabelled_start", start, f"a step below the {settings.iterations} of the run")
    if threshold and not 0 < threshold < 1:
        raise ConfigError("pseudo_labels", threshold, "above 0 and below 1")
    if threshold and not settings.teacher:
        raise ConfigError("pseudo_labels", f"{threshold} without a teacher", "a model that predicts", "give {teacher}")
    if threshold and weight != 1:
        hint = "images with pseudo-labels count as labelled ones"
        raise ConfigError("unlabelled_weight", weight, "1 beside {pseudo_labels}", hint)
    if not threshold and not settings.method:
        hint = "give {teacher} and {method}, or {teacher} and {pseudo_labels}"
        raise ConfigError("unlabelled", "images without labels and without a method", "something to learn", hint)
    if not threshold and needs_pairs(settings.student_name) and settings.unlabelled_batch // world < 2:
        hint = "DeepLabV3 and SSDLite normalise maps of one pixel over the batch"
        raise ConfigError("unlabelled_batch", settings.unlabelled_batch, "2 images a device at least", hint)


class UnlabelledImages(Images):
    """Images of folders, augmented as those with labels; their targets say nothing.

    Args:
        folders: see ``find_images``.
        image_range: see ``images.RANGES``.
        crop: see ``Images``.

    Raises:
        ConfigError: a folder has no image, or an image cannot be used.
    """

    def __init__(self, folders: Sequence[str], *, image_range: str, crop: tuple[int, int] | None = None) -> None:
        super().__init__(semantic=True, crop=crop, name="unlabelled images")
        self.folders = find_images(folders)
        self.paths = [path for paths in self.folders.values() for path in paths]
        check_images(self.paths, image_range=image_range)
        self.image_range, self.categories, self.num_classes = image_range, {}, 0
        self.ids = list(range(len(self.paths)))

    def read(self, index: int) -> tuple[Any, dict[str, Any]]:
        """Read an image; the augmentation wants a label map, which is one value and is given to nobody."""
        image = read_image(self.paths[index], name=self.name, image_range=self.image_range)
        return image, {"semantic": Mask(torch.zeros(image.shape[-2:], dtype=torch.uint8))}

    def files(self) -> tuple[str, list[str]]:
        """Return no path of annotations, and those of the images."""
        return "", list(self.paths)


def load_unlabelled(settings: Settings, validation: Images) -> UnlabelledImages | None:
    """Load the unlabelled images of a run, None if it has none.

    Raises:
        ConfigError: they cannot be used, or some are validation images.
    """
    if not settings.unlabelled:
        return None
    image_range = settings.train_split.image_range
    found = UnlabelledImages(settings.unlabelled, image_range=image_range, crop=settings.crop)
    refuse_shared(found.paths, validation.images(), image_range=image_range)
    return found


class Several(Dataset[Sample]):
    """Datasets one after the other, as one to train on."""

    def __init__(self, parts: Sequence[Images]) -> None:
        self.parts, self.ends = list(parts), list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        index, seed = item
        number = bisect.bisect_right(self.ends, index)
        return self.parts[number][index - (self.ends[number - 1] if number else 0), seed]


@dataclass
class UnlabelledBatches:
    """The batches of the second loader, one for each step from ``unlabelled_start`` on.

    Args:
        images: to train on.
        settings: of the run.
        labelled: the images have pseudo-labels, so they are a part of the labelled batch.
    """

    images: Dataset[Sample]
    settings: Settings
    labelled: bool = False

    def along(self, step: int, *, rank: int, world: int) -> Iterator[Batch | None]:
        """Yield this process's part of the batch of every step from ``step``; None where a step has none."""
        settings = self.settings
        yield from repeat(None, max(0, settings.unlabelled_start - step))
        stream = Stream(
            len(self.images),  # type: ignore[arg-type]
            batch_size=settings.unlabelled_batch,
            batches=settings.iterations,
            seed=settings.seed + SEED,
            rank=rank,
            world=world,
        )
        stream.start = max(step, settings.unlabelled_start)
        yield from training_loader(self.images, stream, workers=settings.workers)  # type: ignore[misc]

    def losses(self, student: nn.Module, attached: Distillation, images: list[Tensor]) -> dict[str, Tensor]:
        """Return the method's weighted losses of a batch; see ``Distillation.unlabelled``."""
        batch = student.batch(images) if isinstance(student, Segmentor) else student.transform(images)[0].tensors  # type: ignore[operator]
        losses = attached.unlabelled(batch, update_statistics=not self.settings.unlabelled_keep_norms)
        return {name: loss * self.settings.unlabelled_weight for name, loss in losses.items()}
