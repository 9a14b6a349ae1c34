"""The training data of semantic segmentation: random scale, crop and flip, and the mapper that makes samples."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T  # noqa: N812

from ..core.errors import ConfigError
from ..data.labels import check_values, read_label

__all__ = ["SemSegMapper", "build_sem_seg_mapper", "sem_seg_augmentations"]

logger = logging.getLogger("detectron2.acam_kd")
Array = np.ndarray[Any, Any]


class PadTransform(T.Transform):
    """Padding at the right and at the bottom: a colour in the image, the ignored value in the label.

    fvcore's PadTransform, which FixedSizeCrop uses, has one grey value for all channels. Detectron2 normalises in the
    model. So the padding has the colour that becomes 0 there, rounded to the image's whole grey levels.

    Args:
        height: the number of rows to add.
        width: the number of columns to add.
        colour: one value per channel, in the image's order.
        ignored: the value of the label's padding.
    """

    def __init__(self, height: int, width: int, colour: Sequence[float], ignored: int) -> None:
        super().__init__()
        self.height, self.width, self.colour, self.ignored = height, width, colour, ignored

    def apply_image(self, img: Array) -> Array:
        """Pad an image: (H, W, C) -> (H + height, W + width, C)."""
        rounded = np.rint(self.colour) if np.issubdtype(img.dtype, np.integer) else np.asarray(self.colour)
        shape = (img.shape[0] + self.height, img.shape[1] + self.width, img.shape[2])
        padded = np.broadcast_to(rounded.astype(img.dtype), shape).copy()
        padded[: img.shape[0], : img.shape[1]] = img
        return padded

    def apply_segmentation(self, segmentation: Array) -> Array:
        """Pad a label: (H, W) -> (H + height, W + width)."""
        return np.pad(segmentation, ((0, self.height), (0, self.width)), constant_values=self.ignored)

    def apply_coords(self, coords: Array) -> Array:
        """Return the coordinates unchanged, since padding at the right and at the bottom moves no point."""
        return coords


class PadTo(T.Augmentation):
    """The augmentation that pads smaller images to (height, width); see ``PadTransform``."""

    def __init__(self, height: int, width: int, colour: Sequence[float], ignored: int) -> None:
        super().__init__()
        self._init(locals())

    def get_transform(self, image: Array) -> T.Transform:
        """Return the padding of one image (H, W, C)."""
        height, width = (max(0, wanted - size) for wanted, size in zip((self.height, self.width), image.shape))
        return PadTransform(height, width, self.colour, self.ignored) if height or width else T.NoOpTransform()


def sem_seg_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """Build the augmentations: a random scale, then a random crop, then a random flip.

    - Scale: INPUT.MIN_SIZE_TRAIN, MIN_SIZE_TRAIN_SAMPLING and MAX_SIZE_TRAIN, as in detection. Factors of 0.5 to 2
      for images of 1024 x 2048 are "range" of (512, 2048), with a maximum of at least 4096. 0 is no scaling.
    - Crop: INPUT.CROP.SIZE is (height, width) in pixels, if INPUT.CROP.ENABLED is True and TYPE is "absolute".
      A smaller image is padded. With INPUT.CROP.SINGLE_CATEGORY_MAX_AREA below 1, up to 10 crops are drawn until no
      class fills more than that part.
    - Flip: INPUT.RANDOM_FLIP.

    Raises:
        ConfigError: the crop has no fixed size in pixels, or a range of scales does not have two ends.
    """
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and len(cfg.INPUT.MIN_SIZE_TRAIN) != 2:
        raise ConfigError(
            "INPUT.MIN_SIZE_TRAIN",
            cfg.INPUT.MIN_SIZE_TRAIN,
            allowed="two sizes",
            hint="INPUT.MIN_SIZE_TRAIN_SAMPLING is range, which needs its two ends",
        )
    scale, *flip = utils.build_augmentation(cfg, is_train=True)
    return [scale, *_crop(cfg), *flip]


def _crop(cfg: CfgNode) -> list[T.Augmentation]:
    """Build the random crop and the padding behind it; see ``sem_seg_augmentations``."""
    crop, ignored = cfg.INPUT.CROP, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    if not crop.ENABLED:
        return []
    if crop.TYPE != "absolute":
        raise ConfigError(
            "INPUT.CROP.TYPE", crop.TYPE, allowed="absolute, since semantic segmentation crops a fixed size"
        )
    if len(crop.SIZE) != 2 or not all(size >= 1 and size == int(size) for size in crop.SIZE):
        raise ConfigError("INPUT.CROP.SIZE", crop.SIZE, allowed="height and width in pixels")
    height, width = map(int, crop.SIZE)
    area = crop.get("SINGLE_CATEGORY_MAX_AREA", 1.0)
    return [
        T.RandomCrop_CategoryAreaConstraint("absolute", (height, width), area, ignored),
        PadTo(height, width, tuple(cfg.MODEL.PIXEL_MEAN), ignored),
    ]


class SemSegMapper:
    """The mapper from Detectron2's dataset dicts to training samples.

    Detectron2's DatasetMapper reads labels as grey images. It turns the class numbers of palette PNGs, as of PASCAL
    VOC, into greys of the palette's colours. It also lets labels pass that do not fit; on a GPU they fail as an
    assertion of a kernel.

    Args:
        augmentations: transforms of image and label together.
        image_format: the order of the image's channels, e.g. "BGR".
        num_classes: labels are from 0 to below this number, or ``ignored``.
        ignored: the label of pixels that do not count.
    """

    def __init__(
        self, *, augmentations: Sequence[T.Augmentation], image_format: str, num_classes: int, ignored: int
    ) -> None:
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format, self.num_classes, self.ignored = image_format, num_classes, ignored

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Read one image and its label, and augment both.

        Args:
            dataset_dict: an entry with ``file_name`` and ``sem_seg_file_name``.

        Returns:
            A copy of the dict with ``image``, (C, H, W), and ``sem_seg``, (H, W) int64.

        Raises:
            ConfigError: there is no label, it differs in size from the image, or it has values that are no classes.
        """
        sample = copy.deepcopy(dataset_dict)
        if "sem_seg_file_name" not in sample:
            raise ConfigError(
                "DATASETS.TRAIN",
                f"image {sample['file_name']} without a label",
                allowed="labels of semantic segmentation",
            )
        path = sample.pop("sem_seg_file_name")
        image = utils.read_image(sample["file_name"], format=self.image_format)
        utils.check_image_size(sample, image)
        label = read_label(path)
        if label.shape != image.shape[:2]:
            (height, width), (rows, columns) = label.shape, image.shape[:2]
            raise ConfigError(
                "DATASETS.TRAIN",
                f"label {path} of {width} x {height}",
                allowed=f"the size of its image, {columns} x {rows}",
            )
        self._check_values(label, path)
        both = T.AugInput(image, sem_seg=label)
        self.augmentations(both)
        sample["image"] = torch.from_numpy(np.ascontiguousarray(both.image.transpose(2, 0, 1)))
        sample["sem_seg"] = torch.from_numpy(both.sem_seg.astype(np.int64, order="C"))
        return sample

    def _check_values(self, label: Array, path: str) -> None:
        """Refuse a label with other values than the head's classes and the ignored one."""
        try:
            check_values(np.bincount(label.reshape(-1), minlength=256), path, self.num_classes, self.ignored)
        except ConfigError as error:
            hint = "correct the label, or set MODEL.SEM_SEG_HEAD.NUM_CLASSES and IGNORE_VALUE as the dataset has them"
            raise ConfigError("DATASETS.TRAIN", f"{error.argument} {error.value}", error.allowed, hint) from error


def build_sem_seg_mapper(cfg: CfgNode) -> SemSegMapper:
    """Build the mapper of ``build_detection_train_loader(cfg, mapper=...)`` for training a SemanticSegmentor.

    Raises:
        ConfigError: see :func:`sem_seg_augmentations`.
    """
    augmentations = sem_seg_augmentations(cfg)
    logger.info(f"augmentations in training: {augmentations}")
    return SemSegMapper(
        augmentations=augmentations,
        image_format=cfg.INPUT.FORMAT,
        num_classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        ignored=cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
    )
