"""Own datasets without writing Python: COCO-format files named in the config."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances

from ..data.shapes import CLASSES, SPLITS, make_shapes

__all__ = ["check_num_classes", "register_coco_datasets"]

KEY = "(key: DATASETS.COCO_FORMAT, or --dataset)"


def register_coco_datasets(datasets: Sequence[Sequence[str]]) -> None:
    """Register COCO-format datasets with Detectron2, after looking into their files.

    Args:
        datasets: ``[name, json file, image folder]`` each.

    Raises:
        FileNotFoundError: the json or the folder does not exist, or an image of the json does not.
        ValueError: an entry is malformed, the json is not COCO, or it has no images or categories.
    """
    for entry in datasets:
        if isinstance(entry, str) or len(entry) != 3:
            raise ValueError(f"a dataset is [name, json file, image folder], found {entry!r} {KEY}")
        name, json_file, image_root = (os.path.expanduser(str(value)) for value in entry)
        classes = _check(name, json_file, image_root)
        if name in DatasetCatalog.list():
            if MetadataCatalog.get(name).get("json_file") != json_file:
                raise ValueError(f"there is a dataset called {name!r} already; choose another name {KEY}")
            continue
        register_coco_instances(name, {}, json_file, image_root)
        MetadataCatalog.get(name).thing_classes = classes


def _check(name: str, json_file: str, image_root: str) -> list[str]:
    """Raise if the files cannot be a COCO dataset; returns the class names in Detectron2's order."""
    if not os.path.isfile(json_file):
        raise FileNotFoundError(f"dataset {name}: no file {os.path.abspath(json_file)} {KEY}")
    if not os.path.isdir(image_root):
        raise FileNotFoundError(f"dataset {name}: no folder {os.path.abspath(image_root)} {KEY}")
    try:
        with open(json_file) as file:
            content = json.load(file)
    except ValueError as error:
        raise ValueError(f"dataset {name}: {json_file} is not json: {error}") from error
    for part in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise ValueError(f"dataset {name}: {json_file} is not in COCO format: it has no list {part!r}")
    for part, things in (("images", "images"), ("annotations", "boxes"), ("categories", "categories")):
        if not content[part]:
            raise ValueError(f"dataset {name}: {json_file} has no {things} {KEY}")
    for image in content["images"]:
        path = os.path.join(image_root, image["file_name"])
        if not os.path.isfile(path):
            raise FileNotFoundError(f"dataset {name}: image {os.path.abspath(path)} of {json_file} does not exist")
    return [category["name"] for category in sorted(content["categories"], key=lambda c: c["id"])]


def check_num_classes(cfg: CfgNode) -> None:
    """Raise ValueError if a dataset of a student's config has another number of classes than its head.

    Only for the heads whose key is known; without this Detectron2 fails on an index, deep inside.
    """
    meta_architecture = cfg.MODEL.META_ARCHITECTURE
    if meta_architecture == "RetinaNet":
        key, expected = "MODEL.RETINANET.NUM_CLASSES", cfg.MODEL.RETINANET.NUM_CLASSES
    elif meta_architecture in ("GeneralizedRCNN", "PanopticFPN"):
        key, expected = "MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES
    else:
        return
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if name not in DatasetCatalog.list():
            raise ValueError(
                f"unknown dataset {name!r} (keys: DATASETS.TRAIN, DATASETS.TEST); register it with --dataset"
            )
        classes = MetadataCatalog.get(name).get("thing_classes", None)
        if classes is not None and len(classes) != expected:
            shown = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
            raise ValueError(f"dataset {name} has {len(classes)} classes ({shown}), but {key} is {expected}")


def _register_shapes() -> None:
    """Register ``shapes_train`` and ``shapes_val``, made below $DETECTRON2_DATASETS when first asked for."""
    folder = Path(os.getenv("DETECTRON2_DATASETS", "datasets")) / "shapes_160_0"
    for split in SPLITS:
        name, json_file, images = f"shapes_{split}", str(folder / f"{split}.json"), str(folder / split)

        def load(name: str = name, json_file: str = json_file, images: str = images) -> list[dict[str, Any]]:
            make_shapes(folder.parent)
            dicts: list[dict[str, Any]] = load_coco_json(json_file, images, name)
            return dicts

        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(
            json_file=json_file, image_root=images, evaluator_type="coco", thing_classes=list(CLASSES)
        )


_register_shapes()
