"""Images with one class each, and their augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torchvision.transforms import v2

from ..core.errors import ConfigError
from ..data.folders import ClassSplit, list_images
from ..data.images import look
from .classification import SMALL, resize_shorter
from .data import Images, read_image

__all__ = ["ClassImages", "reduce_classes"]

KEPT = 2**27
"""The bytes of decoded images that a dataset keeps in each process that reads it."""


class ClassImages(Images):
    """Images in [0, 1] with ``{"image_id", "label"}``; the header of each file is checked first.

    The augmentation is the usual one. From 128 pixels on it is a part of the image of 8 % to all of its area, resized.
    Below, the image is padded by an eighth of its side and a part of the full size is cut out. Then it is flipped.

    Args:
        split: the files.
        size: the side of the squares to train on.
        augment: ``"flip"`` for all of it, ``"crop"`` for no flips, as of digits, ``"none"``.
        name: the dataset's name in messages.

    Raises:
        ConfigError: see ``list_images``; or an image cannot be read.
    """

    def __init__(self, split: ClassSplit, *, size: int, augment: str = "flip", name: str = "dataset") -> None:
        super().__init__(semantic=False, name=name)
        found = list_images(split, name=name)
        for path in found.files:
            if problem := look(path).problem:
                raise ConfigError("dataset", f"{name}: {path}, which cannot be read ({problem})", "a whole image file")
        self.split, self.paths, self.labels = split, found.files, found.labels
        self.categories = dict(enumerate(found.classes))
        self.num_classes = len(found.classes)
        self.ids = list(range(len(found.files)))
        self._kept, self._room = dict[int, Any](), KEPT
        crop = (
            [v2.RandomResizedCrop(size, antialias=True)]
            if size >= SMALL
            else [_Shorter(size), v2.CenterCrop(size), v2.RandomCrop(size, padding=max(1, size // 8))]
        )
        flip = [v2.RandomHorizontalFlip()] if augment == "flip" else []
        self.augment = v2.Compose([*crop, *flip] if augment != "none" else [v2.Identity()])

    def read(self, index: int) -> tuple[Any, dict[str, Any]]:
        """Read the image and the number of its class; small datasets stay in memory once they are read."""
        image = self._kept.get(index)
        if image is None:
            image = read_image(self.paths[index], name=self.name, image_range=self.split.image_range)
            self._room -= image.numel()
            if self._room >= 0:
                self._kept[index] = image
        return image, {"label": self.labels[index]}

    def files(self) -> tuple[str, list[str]]:
        """Return no path of annotations, and those of the images."""
        return "", list(self.paths)

    def keep(self, indices: Sequence[int]) -> None:
        """Keep some of the images alone, with their numbers; the classes stay."""
        self.paths = tuple(self.paths[i] for i in indices)
        self.labels = tuple(self.labels[i] for i in indices)
        self.ids = [self.ids[i] for i in indices]
        self._kept, self._room = {}, KEPT


def reduce_classes(data: Images, fraction: float, leave_out: Sequence[str], seed: int) -> None:
    """Keep a part of each class's images, one at least, and none of some classes.

    Args:
        data: changed in place.
        fraction: the part, above 0 to 1.
        leave_out: names of classes.
        seed: decides which images.

    Raises:
        ConfigError: the data is not for classification, a class is unknown, or fewer than two are left.
    """
    if fraction == 1 and not leave_out:
        return
    argument = "leave_out" if leave_out else "fraction"
    if not isinstance(data, ClassImages):
        raise ConfigError(argument, "a reduction of data with boxes or masks", "data with a class for each image")
    if not 0 < fraction <= 1:
        raise ConfigError("fraction", fraction, "above 0, at most 1")
    names = list(data.categories.values())
    if unknown := [name for name in leave_out if name not in names]:
        raise ConfigError("leave_out", unknown[0], f"classes of the data: {', '.join(names)}")
    kept: list[int] = []
    draw = torch.Generator().manual_seed(seed)
    for label, name in data.categories.items():
        mine = [i for i, other in enumerate(data.labels) if other == label]
        order = torch.randperm(len(mine), generator=draw).tolist()
        if name not in leave_out:
            kept += [mine[k] for k in order[: max(1, round(fraction * len(mine)))]]
    if len({data.labels[i] for i in kept}) < 2:
        raise ConfigError("leave_out", ", ".join(leave_out), "two classes left at least")
    data.keep(sorted(kept))


class _Shorter:
    """Resizes an image by its shorter side, as ``Classifier`` does."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        sized = resize_shorter(image.float(), self.side).round().clamp(0, 255).to(image.dtype)
        return v2.functional.to_image(sized), target
