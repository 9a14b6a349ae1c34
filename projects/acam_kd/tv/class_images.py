"""Images with one class each, and their augmentation."""

from __future__ import annotations

from typing import Any

from torchvision.transforms import v2

from ..core.errors import ConfigError
from ..data.folders import ClassSplit, list_images
from ..data.images import look
from .classification import SMALL, resize_shorter
from .data import Images, read_image

__all__ = ["AUGMENTATIONS", "ClassImages"]

AUGMENTATIONS = ("flip", "crop", "none")


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
        crop = (
            [v2.RandomResizedCrop(size, antialias=True)]
            if size >= SMALL
            else [_Shorter(size), v2.CenterCrop(size), v2.RandomCrop(size, padding=max(1, size // 8))]
        )
        flip = [v2.RandomHorizontalFlip()] if augment == "flip" else []
        self.augment = v2.Compose([*crop, *flip] if augment != "none" else [v2.Identity()])

    def read(self, index: int) -> tuple[Any, dict[str, Any]]:
        """Read the image and the number of its class."""
        image = read_image(self.paths[index], name=self.name, image_range=self.split.image_range)
        return image, {"label": self.labels[index]}

    def files(self) -> tuple[str, list[str]]:
        """Return no path of annotations, and those of the images."""
        return "", list(self.paths)


class _Shorter:
    """Resizes an image by its shorter side, as ``Classifier`` does."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        sized = resize_shorter(image.float(), self.side).round().clamp(0, 255).to(image.dtype)
        return v2.functional.to_image(sized), target
