"""Own datasets of semantic segmentation without writing Python: folders of images and label PNGs, and class names."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..core.errors import ConfigError
from ..data.check import check_labels
from ..data.images import image_size
from ..data.labels import IGNORED, find_pairs, read_class_names
from ..data.shapes import CLASSES, SPLITS, make_shapes

__all__ = ["errors_of_dataset", "register_sem_seg_datasets"]

KEY = "DATASETS.SEM_SEG"

logger = logging.getLogger("detectron2.acam_kd.datasets")


@contextmanager
def errors_of_dataset(name: str, key: str) -> Iterator[None]:
    """Raise the errors of a dataset's readers anew, with the config key that names its files as the argument.

    Raises:
        ConfigError: instead of such an error.
    """
    try:
        yield
    except ConfigError as error:
        value = error.value if error.argument == "dataset" else f"{name}: {error.argument} {error.value}"
        raise ConfigError(key, f"dataset {value}", error.allowed, error.hint) from error


def register_sem_seg_datasets(datasets: Sequence[Sequence[str]], *, check: bool = True) -> None:
    """Register datasets of images and label PNGs with Detectron2, after a check of their files.

    Args:
        datasets: ``[name, image folder, label folder, classes]`` each. The classes are names with commas between them,
            or a text file with one name per line, in the order of the labels' numbers. 255 is ignored.
        check: read every label, which takes a second for 400 small ones. One process of several is enough.

    Raises:
        ConfigError: an entry is malformed, its name is taken, or a folder or the file of classes does not exist. Or an
            image has no label, or a label does not fit its image or the classes.
    """
    for entry in datasets:
        if isinstance(entry, str) or len(entry) != 4 or not all(isinstance(value, str) for value in entry):
            allowed = "[name, image folder, label folder, classes] for each dataset, all of them texts"
            raise ConfigError(KEY, entry, allowed=allowed)
        name = entry[0]
        images, labels = map(os.path.expanduser, entry[1:3])
        with errors_of_dataset(name, KEY):
            classes = read_class_names(entry[3])
            pairs = find_pairs(images, labels, name=name)
            if check:
                check_labels(pairs, classes, name=name, reader="detectron2", say=logger.warning)
        if name in DatasetCatalog.list():
            known = MetadataCatalog.get(name)
            places = [known.get(key, None) for key in ("image_root", "sem_seg_root", "stuff_classes")]
            if places != [images, labels, classes]:
                raise ConfigError(KEY, f"dataset {name}, a name that is taken", allowed="a new name for other files")
            continue
        _register(name, images, labels, classes)


def _register(name: str, images: str, labels: str, classes: Sequence[str], root: Path | None = None) -> None:
    """Register one dataset. With ``root`` it is the drawn shapes, which are made below there at their first use."""

    def load() -> list[dict[str, Any]]:
        if root:
            make_shapes(root)
        dicts: list[dict[str, Any]] = []
        for image, label in find_pairs(images, labels, name=name):
            height, width = image_size(image)
            dicts.append({"file_name": image, "sem_seg_file_name": label, "height": height, "width": width})
        return dicts

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        image_root=images,
        sem_seg_root=labels,
        evaluator_type="sem_seg",
        stuff_classes=list(classes),
        ignore_label=IGNORED,
    )


def _register_shapes() -> None:
    """Register ``acam_shapes_train_sem_seg`` and ``_val_sem_seg``: the shapes drawn for detection, with labels."""
    root = Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
    for split in SPLITS:
        images = str(root / "shapes_160_0" / split)
        _register(f"acam_shapes_{split}_sem_seg", images, f"{images}_labels", ["background", *CLASSES], root)


_register_shapes()
