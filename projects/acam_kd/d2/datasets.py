"""Own datasets without writing Python, and a check of all datasets before a run starts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils import comm

from ..core.errors import ConfigError
from ..data.shapes import CLASSES, SPLITS, make_shapes
from .coco_datasets import register_coco_datasets
from .keypoints import check_keypoints
from .sem_seg_datasets import register_sem_seg_datasets

__all__ = ["add_dataset_options", "check_datasets", "register_datasets"]

TRAIN, TEST = "DATASETS.TRAIN", "DATASETS.TEST"
PLACES = ("json_file", "image_root", "dirname", "image_dir", "gt_dir", "sem_seg_root", "panoptic_root", "panoptic_json")
"""The fields of the metadata in which Detectron2's own datasets name their files and folders."""
NUM_CLASSES = {
    "RetinaNet": {"thing_classes": "MODEL.RETINANET.NUM_CLASSES"},
    "GeneralizedRCNN": {"thing_classes": "MODEL.ROI_HEADS.NUM_CLASSES"},
    "RepPoints": {"thing_classes": "MODEL.REPPOINTS.NUM_CLASSES"},
    "TensorMask": {"thing_classes": "MODEL.TENSOR_MASK.NUM_CLASSES"},
    "PanopticFPN": {
        "thing_classes": "MODEL.ROI_HEADS.NUM_CLASSES",
        "stuff_classes": "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
    },
    "PanopticDeepLab": {"stuff_classes": "MODEL.SEM_SEG_HEAD.NUM_CLASSES"},
    "SemanticSegmentor": {"stuff_classes": "MODEL.SEM_SEG_HEAD.NUM_CLASSES"},
}
"""Meta-architecture -> field of the metadata -> the key with the number of its classes, in Detectron2's own models."""
SEMANTIC = ("sem_seg", "coco_panoptic_seg", "cityscapes_sem_seg", "cityscapes_panoptic_seg", "ade20k_panoptic_seg")
"""The ``evaluator_type`` of datasets whose evaluation reads labels of semantic segmentation."""
DRAWN = "acam_shapes_"
"""The beginning of the names of datasets whose files need not be there yet."""


def add_dataset_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--dataset`` and ``--sem-seg-dataset``, both repeatable, for :func:`register_datasets`."""
    use = "under NAME, for DATASETS.TRAIN and DATASETS.TEST; may be repeated"
    parser.add_argument(
        "--dataset",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "JSON", "IMAGES"),
        help=f"register a COCO-format dataset {use}; YOLO's or Pascal VOC's as NAME FOLDER train, or NAME FOLDER val",
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
    """Register the own datasets of a config that a run uses. The others are not read, so they may be broken.

    Raises:
        ConfigError: see :func:`register_coco_datasets` and :func:`register_sem_seg_datasets`.
        RunError: a mended json cannot be written into OUTPUT_DIR.
    """
    names = (*cfg.DATASETS.TEST, *((*cfg.DATASETS.TRAIN, *cfg.DATASETS.UNLABELLED) if training else ()))

    def used(entries: Sequence[Sequence[str]], length: int) -> list[Sequence[str]]:
        return [entry for entry in entries if len(entry) != length or entry[0] in names]

    def register() -> None:
        register_coco_datasets(
            used(cfg.DATASETS.COCO_FORMAT, 3),
            output_dir=cfg.OUTPUT_DIR,
            masks=bool(cfg.MODEL.MASK_ON),
            evaluated=cfg.DATASETS.TEST,
        )
        register_sem_seg_datasets(used(cfg.DATASETS.SEM_SEG, 4), check=comm.is_main_process())

    if comm.is_main_process():
        try:
            register()
        finally:
            comm.synchronize()
    else:
        comm.synchronize()  # then the first process has left in the cache what it found
        register()


def check_datasets(cfg: CfgNode, *, training: bool) -> None:
    """Check that the datasets of a student's config exist and fit its heads.

    Without this check Detectron2 fails later and deep inside, after the model was built. Some numbers of classes fail
    only at an index, and keypoints partly only in the evaluation at the end.

    Raises:
        ConfigError: no dataset is named, a name is unknown, or a file or folder does not exist. Or the numbers of
            classes differ, or the keypoints do not fit (see ``check_keypoints``).
    """
    if training and not cfg.DATASETS.TRAIN:
        raise ConfigError(TRAIN, cfg.DATASETS.TRAIN, allowed="at least one dataset to train on")
    if not training and not cfg.DATASETS.TEST:
        raise ConfigError(TEST, cfg.DATASETS.TEST, allowed="at least one dataset to evaluate")
    for use, names in ((TRAIN, cfg.DATASETS.TRAIN if training else ()), (TEST, cfg.DATASETS.TEST)):
        for name in names:
            _check_files(use, name)
            _check_classes(cfg, use, name)
    check_keypoints(cfg, training=training)


def _check_files(use: str, name: str) -> None:
    """Refuse a dataset that is unknown, or whose files do not exist."""
    if name not in DatasetCatalog.list():
        raise ConfigError(
            use,
            name,
            allowed="a registered dataset",
            hint="register it with --dataset or --sem-seg-dataset, or in DATASETS.COCO_FORMAT or DATASETS.SEM_SEG",
        )
    metadata = MetadataCatalog.get(name)
    for place in PLACES:
        path = metadata.get(place, None)
        if path and "://" not in path and not os.path.exists(path) and not name.startswith(DRAWN):
            raise ConfigError(
                use,
                f"dataset {name}: no {os.path.abspath(path)}",
                allowed="an existing file or folder",
                hint="Detectron2 looks for its datasets below $DETECTRON2_DATASETS",
            )


def _check_classes(cfg: CfgNode, use: str, name: str) -> None:
    """Refuse a dataset with another number of classes than the heads'."""
    for field, key in NUM_CLASSES.get(cfg.MODEL.META_ARCHITECTURE, {}).items():
        if field == "stuff_classes" and not _reads_labels(cfg, use, name):
            continue
        classes = MetadataCatalog.get(name).get(field, None)
        if classes is not None and len(classes) != attrgetter(key)(cfg):
            shown = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
            allowed = f"{len(classes)}, the classes of dataset {name}: {shown}"
            raise ConfigError(key, attrgetter(key)(cfg), allowed=allowed)
        if field == "stuff_classes":
            _check_labels(cfg, use, name)


def _reads_labels(cfg: CfgNode, use: str, name: str) -> bool:
    """Return True if the labels of semantic segmentation of a dataset are read, in training or by its evaluator."""
    evaluated = MetadataCatalog.get(name).get("evaluator_type", None) in SEMANTIC
    return use == TRAIN or evaluated or cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor"


def _check_labels(cfg: CfgNode, use: str, name: str) -> None:
    """Refuse a dataset whose labels are not those of a head of semantic segmentation."""
    metadata = MetadataCatalog.get(name)
    fields = {field: metadata.get(field, None) for field in ("stuff_classes", "ignore_label")}
    optional = "ignore_label" if (cfg.MODEL.META_ARCHITECTURE, use) == ("PanopticFPN", TRAIN) else ""
    missing = [field for field, value in fields.items() if value is None and field != optional]
    if missing:
        raise ConfigError(
            use,
            f"dataset {name} without {missing[0]} in its metadata",
            allowed=f"a dataset with labels of semantic segmentation, for {cfg.MODEL.META_ARCHITECTURE}",
        )
    ignored, head = fields["ignore_label"], cfg.MODEL.SEM_SEG_HEAD
    if ignored not in (None, head.IGNORE_VALUE):
        allowed = f"{ignored}, the ignored label of dataset {name}"
        raise ConfigError("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", head.IGNORE_VALUE, allowed=allowed)


def _register_shapes() -> None:
    """Register ``acam_shapes_train`` and ``_val``; their first use draws them below $DETECTRON2_DATASETS."""
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
