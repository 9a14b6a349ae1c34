"""The options of a dataset, for all commands that read one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import ConfigError
from ..data.division import Division, divide
from ..data.folders import ClassSplit, divide_classes
from ..data.images import AUTO, RANGES
from ..data.label_division import divide_labels
from ..data.splits import LabelSplit, Split, find_any_split, find_whole, named_split
from ..fields import natural, option

__all__ = ["Data", "Validation"]

FILES = ("JSON|IMAGES", "IMAGES|LABELS")


@dataclass(frozen=True)
class Validation:
    """The data to evaluate on."""

    data: str = option(
        "",
        section="data: --data, or the files of each split; in COCO's, YOLO's or Pascal VOC's format, or label PNGs, or "
        "folders of images that are classes",
        metavar="FOLDER|YAML|CSV",
        help="train.json + train/ and val.json + val/, or COCO's own layout; YOLO's, with a data.yaml; Pascal VOC's, "
        "with Annotations, JPEGImages, ImageSets; or, for segmentation, train/images, train/labels, val/images, "
        "val/labels with a label PNG of class numbers per image, where 255 is ignored; or, for classification, "
        "a folder of images for each class in train/ and val/, or train.csv and val.csv with "
        "columns path and class",
    )
    val: tuple[str, str] | None = option(None, nargs=2, metavar=FILES, help="the val split: json or folders")
    classes: str = option(
        "",
        metavar="NAMES|FILE",
        help="of label PNGs, from number 0, with commas between them or one per line; else FOLDER/classes.txt",
    )
    val_fraction: float | None = option(
        None, type=float, metavar="F", help="of a dataset without a split: validate on this part of it"
    )
    split_seed: int = option(0, type=natural, metavar="N", help="decides which part; 0 if left out")
    group_by: str = option(
        "",
        metavar="REGEX",
        help="images whose names agree in this stay together, as frames of one scene: '^([^_]+)_' for scene_0001.jpg",
    )
    image_range: str = option(
        AUTO,
        choices=RANGES,
        help="of grey images of more than 8 bits: the values from black to white; auto: 16 bits are divided by 256, "
        "and other kinds are refused",
    )

    def splits(self, *names: str, folder: Path | None = None) -> dict[str, Split]:
        """Find splits by their names.

        Args:
            *names: ``"train"``, ``"val"``.
            folder: gets the parts of data that are divided; None for the cache.

        Raises:
            ConfigError: they are not there, or options contradict each other.
        """
        if self.val_fraction is not None:
            parts = self._divided(self.val_fraction, folder)
            return {name: parts[name] for name in names}
        if self.group_by or self.split_seed:
            argument = "group_by" if self.group_by else "split_seed"
            raise ConfigError(argument, getattr(self, argument), "none without a fraction", "give {val_fraction}")
        return {name: self.split(name) for name in names}

    def split(self, name: str) -> Split:
        """Find one split of data that is not to be divided."""
        files = getattr(self, name)
        if files:
            return named_split(files[0], files[1], self.classes, self.image_range)
        if not self.data:
            raise ConfigError(
                f"{name}_split", "nothing", "JSON IMAGES, or IMAGES LABELS", "or --data FOLDER with both splits"
            )
        return find_any_split(self.data, name, self.classes, self.image_range)

    def _divided(self, fraction: float, folder: Path | None) -> Mapping[str, Split]:
        named = [files for name in ("train", "val") if (files := getattr(self, name, None))]
        if bool(self.data) + len(named) != 1:
            found = "a fraction without data" if not named else "a fraction of two datasets"
            raise ConfigError("val_fraction", found, "one dataset", "give one of {data}, {train_split}, {val_split}")
        whole = (
            named_split(named[0][0], named[0][1], self.classes, self.image_range)
            if named
            else find_whole(self.data, self.classes, self.image_range)
        )
        division = Division(fraction, self.split_seed, self.group_by)
        if isinstance(whole, ClassSplit):
            return divide_classes(whole, division)
        if isinstance(whole, LabelSplit):
            return divide_labels(whole, division, folder)
        return divide(whole, division, folder)


@dataclass(frozen=True)
class Data(Validation):
    """The data to train and to evaluate on."""

    train: tuple[str, str] | None = option(None, nargs=2, metavar=FILES, help="the train split: json or folders")
