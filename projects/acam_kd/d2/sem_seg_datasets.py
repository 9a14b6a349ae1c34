"""Semantic segmentation datasets without writing Python: a folder of images, one of label PNGs, and class names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..data.labels import IGNORED, check_labels, find_pairs, image_size, read_class_names
from ..data.shapes import CLASSES, SPLITS, make_shapes

__all__ = ["register_sem_seg_datasets"]

KEY = "(key: DATASETS.SEM_SEG, or --sem-seg-dataset)"


def register_sem_seg_datasets(datasets: Sequence[Sequence[str]], *, check: bool = True) -> None:
    """Register datasets of images and label PNGs with Detectron2, after looking into their files.

    Args:
        datasets: ``[name, image folder, label folder, classes]`` each; the classes are names with commas between
            them, or a text file with one name per line, in the order of the labels' numbers. 255 is ignored.
        check: read every label, which takes a second for 400 small ones; one process of several is enough.

    Raises:
        FileNotFoundError: a folder or the file of classes does not exist, or an image has no label.
        ValueError: an entry is malformed, its name is taken, or a label does not fit its image or the classes.
    """
    for entry in datasets:
        if isinstance(entry, str) or len(entry) != 4 or not all(isinstance(value, str) for value in entry):
            raise ValueError(f"a dataset is [name, image folder, label folder, classes], found {entry!r} {KEY}")
        name = entry[0]
        images, labels = map(os.path.expanduser, entry[1:3])
        described = f"dataset {name}"
        classes = _class_names(described, entry[3])
        pairs = find_pairs(images, labels, name=described, hint=KEY)
        if check:
            check_labels(pairs, classes, name=described, hint=KEY)
        if name in DatasetCatalog.list():
            known = MetadataCatalog.get(name)
            places = [known.get(key, None) for key in ("image_root", "sem_seg_root", "stuff_classes")]
            if places != [images, labels, classes]:
                raise ValueError(f"there is a dataset called {name!r} already; choose another name {KEY}")
            continue
        _register(name, images, labels, classes)


def _class_names(described: str, classes: str) -> list[str]:
    try:
        return read_class_names(classes, hint=KEY)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{described}: {error}") from error


def _register(name: str, images: str, labels: str, classes: Sequence[str], root: Path | None = None) -> None:
    """Register one dataset; with ``root`` it is the drawn shapes, made below there when first asked for."""

    def load() -> list[dict[str, Any]]:
        if root:
            make_shapes(root)
        dicts: list[dict[str, Any]] = []
        for image, label in find_pairs(images, labels, name=f"dataset {name}"):
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
    """Register ``acam_shapes_train_sem_seg`` and ``_val_sem_seg``: what is drawn for detection, with its labels."""
    root = Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
    for split in SPLITS:
        images = str(root / "shapes_160_0" / split)
        _register(f"acam_shapes_{split}_sem_seg", images, f"{images}_labels", ["background", *CLASSES], root)


_register_shapes()
