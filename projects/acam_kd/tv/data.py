"""Data for torchvision's models: reading and augmentation."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from typing import Any

import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, Mask
from torchvision.tv_tensors import Image as PixelImage

from ..core.errors import ConfigError
from ..data.check import Needs, check_coco
from ..data.coco import CocoSplit
from ..data.collecting import uncollected
from ..data.images import AUTO, read_rgb
from ..data.labels import IGNORED
from .batches import Sample, Stream, evaluation_loader, training_loader

__all__ = ["CocoImages", "Images", "Stream", "evaluation_loader", "label_of", "read_image", "training_loader"]

SCALES = (0.5, 2.0)
"""The range of the random scale of an image before it is cropped, as in torchvision's recipe for segmentation."""
MEAN_COLOUR = (124, 116, 104)
"""ImageNet's mean colour, which is about 0 once normalised."""


def label_of(categories: Sequence[int]) -> dict[int, int]:
    """Map COCO category ids to labels; 0 is the background, as everywhere in torchvision.

    Ids between 1 and twice their number are labels as they are. So COCO's own 80 ids from 1 to 90 keep the numbers that
    torchvision's weights have. Others are numbered from 1, in the order of their ids.
    """
    ids = sorted(categories)
    if ids[0] >= 1 and ids[-1] <= 2 * len(ids):
        return {i: i for i in ids}
    return {i: number for number, i in enumerate(ids, 1)}


class Images(Dataset[Sample]):
    """Images in [0, 1] with torchvision's targets.

    An item is asked for by its index, or, for training, by (index, seed). The seed alone decides the augmentation, so
    neither the workers nor other draws of random numbers change it. The augmentation is a flip; with ``crop``
    another scale and a crop come first.

    Args:
        semantic: targets are for segmentation.
        crop: height and width of the part to cut out, for segmentation. Smaller images are padded with pixels that do
            not count.
        name: the dataset's name in messages.
    """

    ids: list[int]
    categories: dict[int, str]
    """Label -> name."""
    num_classes: int

    def __init__(self, *, semantic: bool, crop: tuple[int, int] | None = None, name: str = "dataset") -> None:
        self.semantic, self.name = semantic, name
        flip = v2.RandomHorizontalFlip()
        self.augment = v2.Compose([_ScaleAndCrop(crop), flip]) if crop else flip
        self.finish = v2.Compose([v2.ClampBoundingBoxes(), v2.ToDtype(torch.float32, scale=True)])

    def read(self, index: int) -> tuple[Any, dict[str, Any]]:
        """Read the image, uint8, and its target without ``image_id``; each kind of dataset has its own method."""
        raise NotImplementedError

    def files(self) -> tuple[str, list[str]]:
        """Return the path of the annotations, or an empty one, and those of all images and label images."""
        raise NotImplementedError

    def images(self) -> list[str]:
        """Return the paths of all images."""
        return self.files()[1]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int | tuple[int, int]) -> Sample:
        seed = None
        if isinstance(index, tuple):
            index, seed = index
        image, target = self.read(index)
        if seed is not None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                image, target = self.augment(image, target)
        image, target = self.finish(image, target)
        target["image_id"] = self.ids[index]
        return image.as_subclass(Tensor), _without_empty(target)


class _ScaleAndCrop:
    """A random scale, then a random part of a fixed size."""

    def __init__(self, crop: tuple[int, int]) -> None:
        fill = {PixelImage: MEAN_COLOUR, Mask: IGNORED}
        self.crop = v2.RandomCrop(crop, pad_if_needed=True, fill=fill)  # type: ignore[arg-type]

    def __call__(self, image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        scale = float(torch.empty(()).uniform_(*SCALES))
        size = [max(1, round(side * scale)) for side in image.shape[-2:]]
        image = v2.functional.resize(image, size, antialias=True)
        labels = v2.functional.resize(target["semantic"], size)  # by the nearest, because it is a Mask
        cropped: tuple[Any, dict[str, Any]] = self.crop(image, {**target, "semantic": labels})
        return cropped


def read_image(path: str, *, name: str, image_range: str = AUTO) -> Any:
    """Read an image as (3, H, W), uint8, turned as its EXIF entry says; see ``images.read_rgb``.

    Raises:
        ConfigError: the file is not a readable image, or its values do not fit the range.
    """
    try:
        return v2.functional.to_image(read_rgb(path, image_range))
    except ConfigError as error:
        if error.argument != "image":
            raise
        raise ConfigError("dataset", f"{name}: {error.value}", error.allowed, error.hint) from error


class CocoImages(Images):
    """Images of a COCO json.

    Targets have ``image_id``. For detection they have ``boxes`` (K, 4) as x0, y0, x1, y1, ``labels`` (K,) and, if
    asked for, ``masks`` (K, H, W). For segmentation they have ``semantic`` (H, W), where smaller objects lie over
    larger ones. Boxes are clipped to the image; crowds and empty boxes are left out.

    Args:
        split: the files.
        semantic: targets are for segmentation.
        masks: targets have instance masks.
        crop: see ``Images``.
        name: the dataset's name in messages.

    Raises:
        ConfigError: see ``check_coco``.
    """

    def __init__(
        self,
        split: CocoSplit,
        *,
        semantic: bool = False,
        masks: bool = False,
        crop: tuple[int, int] | None = None,
        name: str = "dataset",
    ) -> None:
        super().__init__(semantic=semantic, crop=crop, name=name)
        needs = Needs(masks=masks or semantic)
        content = check_coco(
            split.json_file, split.image_root, name=name, needs=needs, image_range=split.image_range
        ).content
        self.split, self.masks = split, masks
        self.coco = COCO()
        self.coco.dataset = content
        with uncollected(), contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what it does
            self.coco.createIndex()
        self.ids = sorted(self.coco.imgs)
        self.labels = label_of([category["id"] for category in content["categories"]])
        self.categories = {self.labels[c["id"]]: str(c["name"]) for c in content["categories"]}
        self.num_classes = max(self.labels.values()) + 1

    def read(self, index: int) -> tuple[Any, dict[str, Any]]:
        """Read the image and its objects.

        Raises:
            ConfigError: the image cannot be read, or has another size than the json says.
        """
        image_id = self.ids[index]
        image = self._image(self.coco.imgs[image_id])
        return image, self._target(self.coco.imgToAnns[image_id], image.shape[-2:])

    def files(self) -> tuple[str, list[str]]:
        """Return the json's path and those of the images."""
        names = (entry["file_name"] for entry in self.coco.imgs.values())
        return self.split.json_file, [os.path.join(self.split.image_root, name) for name in names]

    def _image(self, entry: dict[str, Any]) -> Any:
        path = os.path.join(self.split.image_root, entry["file_name"])
        image = read_image(path, name=self.name, image_range=self.split.image_range)
        height, width = image.shape[-2:]
        if (width, height) != (entry["width"], entry["height"]):
            raise ConfigError(
                "dataset",
                f"{self.name}: {path} with {width} x {height} pixels",
                allowed=f"{entry['width']} x {entry['height']}, as {self.split.json_file} says",
            )
        return image

    def _target(self, annotations: list[dict[str, Any]], shape: tuple[int, int]) -> dict[str, Any]:
        if self.semantic:
            return {"semantic": Mask(self._semantic(annotations, shape))}
        kept = [a for a in annotations if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in kept], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target: dict[str, Any] = {
            "boxes": BoundingBoxes(boxes, format="XYXY", canvas_size=shape),  # type: ignore[call-overload]
            "labels": torch.tensor([self.labels[a["category_id"]] for a in kept], dtype=torch.int64),
        }
        if self.masks:
            drawn = [torch.from_numpy(self.coco.annToMask(a)) for a in kept]
            target["masks"] = Mask(torch.stack(drawn) if drawn else torch.zeros((0, *shape), dtype=torch.uint8))
        return target

    def _semantic(self, annotations: list[dict[str, Any]], shape: tuple[int, int]) -> Tensor:
        semantic = torch.zeros(shape, dtype=torch.int64)
        for a in sorted(annotations, key=lambda a: -a["area"]):
            semantic[torch.from_numpy(self.coco.annToMask(a)).bool()] = self.labels[a["category_id"]]
        return semantic


def _without_empty(target: dict[str, Any]) -> dict[str, Any]:
    if "label" in target:
        return target
    if "boxes" not in target:
        return {**target, "semantic": target["semantic"].as_subclass(Tensor).long()}
    boxes = target["boxes"].as_subclass(Tensor)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    target = {**target, "boxes": boxes[kept], "labels": target["labels"][kept]}
    if "masks" in target:
        target["masks"] = target["masks"].as_subclass(Tensor)[kept]
    return target
