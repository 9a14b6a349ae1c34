"""Images and label PNGs for torchvision's segmentation models, and the choice between them and COCO's format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torchvision.tv_tensors import Mask

from ..core.errors import ConfigError
from ..data.check import check_labels
from ..data.folders import ClassSplit
from ..data.labels import find_pairs, read_label
from ..data.splits import LabelSplit, Split
from ..export.exported import DETECTION, INSTANCES, SEGMENTATION
from .class_images import ClassImages
from .classification import usual_size
from .data import CocoImages, Images, read_image
from .models import is_classifier, is_segmentation

__all__ = ["LabelledImages", "load_data", "load_data_of"]


class LabelledImages(Images):
    """Images in [0, 1] with ``{"image_id", "semantic": (H, W)}``; all labels are checked first.

    Args:
        split: the files and the names of the classes.
        crop: see ``Images``.
        name: the dataset's name in messages.

    Raises:
        ConfigError: see ``find_pairs`` and ``check_labels``.
    """

    def __init__(self, split: LabelSplit, *, crop: tuple[int, int] | None = None, name: str = "dataset") -> None:
        super().__init__(semantic=True, crop=crop, name=name)
        self.pairs = find_pairs(split.image_root, split.label_root, name=name)
        self.image_range = split.image_range
        check_labels(self.pairs, split.classes, name=name, image_range=split.image_range)
        self.categories = dict(enumerate(split.classes))
        self.num_classes = len(split.classes)
        self.ids = list(range(1, len(self.pairs) + 1))

    def read(self, index: int) -> tuple[Any, dict[str, Any]]:
        """Read image and labels, as ``check_labels`` has seen them."""
        image, label = self.pairs[index]
        pixels = read_image(image, name=self.name, image_range=self.image_range)
        return pixels, {"semantic": Mask(torch.from_numpy(read_label(label)).long())}

    def files(self) -> tuple[str, list[str]]:
        """Return no path of annotations, and those of images and label images."""
        return "", [path for pair in self.pairs for path in pair]

    def images(self) -> list[str]:
        """Return the paths of all images."""
        return [image for image, _ in self.pairs]


def load_data(
    split: Split,
    model: str,
    *,
    name: str,
    crop: tuple[int, int] | None = None,
    size: int | None = None,
    augment: str = "flip",
) -> Images:
    """Build the dataset of a split, with the targets that a model needs.

    Args:
        split: the files.
        model: the name of the student's model.
        name: the dataset's name in messages.
        crop: see ``Images``.
        size, augment: see ``ClassImages``; without a size, the model's usual one.

    Raises:
        ConfigError: the model is for another task than the data, a detector is to be trained on crops, or the files
            cannot be used.
    """
    if is_classifier(model) or isinstance(split, ClassSplit):
        return _load_classes(split, model, name=name, crop=crop, size=size, augment=augment)
    outputs = SEGMENTATION if is_segmentation(model) else INSTANCES if model.startswith("maskrcnn") else DETECTION
    return load_data_of(split, model, outputs, name=name, crop=crop)


def load_data_of(
    split: Split, model: str, outputs: Sequence[str], *, name: str, crop: tuple[int, int] | None = None
) -> Images:
    """Build the dataset of a split, with the targets of a detector or a segmentation model of whichever engine.

    Args:
        split, model, name, crop: as of ``load_data``.
        outputs: the names of the model's outputs, as in ``export.exported``.

    Raises:
        ConfigError: see ``load_data``.
    """
    if isinstance(split, ClassSplit):
        raise _not_a_classifier(model, name)
    semantic = outputs == SEGMENTATION
    if isinstance(split, LabelSplit):
        if not semantic:
            raise ConfigError(
                "student",
                f"{model} for {name} with label PNGs in {split.label_root}",
                allowed="a segmentation model, as deeplabv3_resnet50",
                hint="detectors need data in COCO format",
            )
        return LabelledImages(split, crop=crop, name=name)
    if crop and not semantic:
        raise ConfigError(
            "crop",
            f"{crop[0]} x {crop[1]} for {model}",
            allowed="whole images, because only segmentation models, as deeplabv3_resnet50, learn from crops",
            hint="leave {crop} out, or change {student}",
        )
    return CocoImages(split, semantic=semantic, masks="masks" in outputs, crop=crop, name=name)


def _load_classes(
    split: Split, model: str, *, name: str, crop: tuple[int, int] | None, size: int | None, augment: str
) -> ClassImages:
    if not isinstance(split, ClassSplit):
        raise ConfigError(
            "student", f"{model}, a classifier, for {name} with boxes or masks", "a detector or a segmentation model",
            "a classifier needs a folder of images for each class",
        )  # fmt: skip
    if not is_classifier(model):
        raise _not_a_classifier(model, name)
    if crop:
        raise ConfigError(
            "crop", f"{crop[0]} x {crop[1]} for {model}", "none, because a classifier has square images",
            "leave {crop} out, and give {size}",
        )  # fmt: skip
    return ClassImages(split, size=size or usual_size(model), augment=augment, name=name)


def _not_a_classifier(model: str, name: str) -> ConfigError:
    return ConfigError(
        "student", f"{model} for {name} with a class for each image", "a classifier, as resnet18 or resnet20",
        "detectors need data in COCO format",
    )  # fmt: skip
