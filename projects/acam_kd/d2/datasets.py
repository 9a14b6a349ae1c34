"""Own datasets without writing Python, and a look at all datasets before a run starts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.utils import comm

from ..data.coco import check_coco
from ..data.shapes import CLASSES, SPLITS, make_shapes
from .sem_seg_datasets import register_sem_seg_datasets

__all__ = ["add_dataset_options", "check_datasets", "register_coco_datasets", "register_datasets"]

KEY = "(key: DATASETS.COCO_FORMAT, or --dataset)"
PLACES = ("json_file", "image_root", "dirname", "image_dir", "gt_dir", "sem_seg_root", "panoptic_root", "panoptic_json")
"""Where the metadata of Detectron2's own datasets says that their files are."""
NUM_CLASSES = {
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "PanopticFPN": "MODEL.ROI_HEADS.NUM_CLASSES",
}
"""Where the known heads are told the number of classes."""
DRAWN = "acam_shapes_"
"""Begins the names of the datasets whose files need not be there yet."""


def add_dataset_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--dataset`` and ``--sem-seg-dataset``, both repeatable, for :func:`register_datasets`."""
    use = "under NAME, for DATASETS.TRAIN and DATASETS.TEST; may be repeated"
    parser.add_argument(
        "--dataset",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "JSON", "IMAGES"),
        help=f"register a COCO-format dataset {use}",
    )
    parser.add_argument(
        "--sem-seg-dataset",
        nargs=4,
        action="append",
        default=[],
        metavar=("NAME", "IMAGES", "LABELS", "CLASSES"),
        help=f"register folders of images and label PNGs, and the classes' names (a,b,c or a file of lines), {use}",
    )


def register_datasets(cfg: CfgNode, *, training: bool) -> None:
    """Register the own datasets of a config that a run uses; the others may well be broken.

    Raises:
        FileNotFoundError, ValueError: see :func:`register_coco_datasets` and :func:`register_sem_seg_datasets`.
    """
    names = (*cfg.DATASETS.TEST, *(cfg.DATASETS.TRAIN if training else ()))

    def used(entries: Sequence[Sequence[str]], length: int) -> list[Sequence[str]]:
        return [entry for entry in entries if len(entry) != length or entry[0] in names]

    register_coco_datasets(used(cfg.DATASETS.COCO_FORMAT, 3))
    register_sem_seg_datasets(used(cfg.DATASETS.SEM_SEG, 4), check=comm.is_main_process())


def register_coco_datasets(datasets: Sequence[Sequence[str]]) -> None:
    """Register COCO-format datasets with Detectron2, after looking into their files.

    Args:
        datasets: ``[name, json file, image folder]`` each.

    Raises:
        FileNotFoundError: the json or the folder does not exist, or an image of the json does not.
        ValueError: an entry is malformed, its name is taken, or the json is not what pycocotools needs.
    """
    for entry in datasets:
        if isinstance(entry, str) or len(entry) != 3:
            raise ValueError(f"a dataset is [name, json file, image folder], found {entry!r} {KEY}")
        name, json_file, image_root = (os.path.expanduser(str(value)) for value in entry)
        content = check_coco(json_file, image_root, name=f"dataset {name}", hint=KEY)
        zero = [number for number, annotation in enumerate(content["annotations"]) if annotation["id"] == 0]
        if zero:
            raise ValueError(
                f"dataset {name}: {json_file}: annotations[{zero[0]}]: id is 0, which COCO evaluation takes for "
                "'no match'; start at 1"
            )
        if name in DatasetCatalog.list():
            known = MetadataCatalog.get(name)
            if (known.get("json_file"), known.get("image_root")) != (json_file, image_root):
                raise ValueError(f"there is a dataset called {name!r} already; choose another name {KEY}")
            continue
        register_coco_instances(name, {}, json_file, image_root)
        by_id = sorted(content["categories"], key=lambda category: category["id"])  # Detectron2's order
        MetadataCatalog.get(name).thing_classes = [category["name"] for category in by_id]


def check_datasets(cfg: CfgNode, *, training: bool) -> None:
    """Look whether the datasets of a student's config are there and have as many classes as its head.

    Without this Detectron2 fails deep inside, after the model was built, and partly only on an index.

    Raises:
        FileNotFoundError: a file or folder of a registered dataset does not exist.
        ValueError: a name is unknown, nothing is named to train on, or the numbers of classes differ.
    """
    if training and not cfg.DATASETS.TRAIN:
        raise ValueError("there is nothing to train on (key: DATASETS.TRAIN)")
    if not training and not cfg.DATASETS.TEST:
        raise ValueError("there is nothing to evaluate (key: DATASETS.TEST)")
    key = NUM_CLASSES.get(cfg.MODEL.META_ARCHITECTURE, "")
    for name in (*(cfg.DATASETS.TRAIN if training else ()), *cfg.DATASETS.TEST):
        if name not in DatasetCatalog.list():
            raise ValueError(
                f"unknown dataset {name!r} (keys: DATASETS.TRAIN, DATASETS.TEST); register it with --dataset or "
                "--sem-seg-dataset"
            )
        metadata = MetadataCatalog.get(name)
        for place in PLACES:
            path = metadata.get(place, None)
            if path and "://" not in path and not os.path.exists(path) and not name.startswith(DRAWN):
                raise FileNotFoundError(
                    f"dataset {name}: no {os.path.abspath(path)} (Detectron2 looks for its datasets below "
                    "$DETECTRON2_DATASETS)"
                )
        classes = metadata.get("thing_classes", None)
        if key and classes is not None and len(classes) != attrgetter(key)(cfg):
            shown = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
            raise ValueError(
                f"dataset {name} has {len(classes)} classes ({shown}), but {key} is {attrgetter(key)(cfg)}"
            )
        if cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor":
            _check_sem_seg(cfg.MODEL.SEM_SEG_HEAD, name)


def _check_sem_seg(head: CfgNode, name: str) -> None:
    """Raise ValueError if a dataset's labels are not what a head of semantic segmentation is trained for."""
    metadata = MetadataCatalog.get(name)
    classes, ignored = metadata.get("stuff_classes", None), metadata.get("ignore_label", None)
    if classes is None or ignored is None:
        missing = "stuff_classes" if classes is None else "ignore_label"
        raise ValueError(
            f"dataset {name} is not for semantic segmentation: its metadata has no {missing} (keys: DATASETS.TRAIN, "
            "DATASETS.TEST)"
        )
    if len(classes) != head.NUM_CLASSES:
        shown = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
        raise ValueError(
            f"dataset {name} has {len(classes)} classes ({shown}), but MODEL.SEM_SEG_HEAD.NUM_CLASSES is "
            f"{head.NUM_CLASSES}"
        )
    if ignored != head.IGNORE_VALUE:
        raise ValueError(
            f"dataset {name} ignores label {ignored}, but MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {head.IGNORE_VALUE}"
        )


def _register_shapes() -> None:
    """Register ``acam_shapes_train`` and ``_val``, drawn below $DETECTRON2_DATASETS when first asked for."""
    folder = Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))) / "shapes_160_0"
    for split in SPLITS:
        name = f"{DRAWN}{split}"
        json_file, images = str(folder / f"{split}.json"), str(folder / split)

        def load(name: str = name, json_file: str = json_file, images: str = images) -> list[dict[str, Any]]:
            make_shapes(folder.parent)
            dicts: list[dict[str, Any]] = load_coco_json(json_file, images, name)
            return dicts

        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(
            json_file=json_file, image_root=images, evaluator_type="coco", thing_classes=list(CLASSES)
        )


_register_shapes()
