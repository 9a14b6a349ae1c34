"""Own datasets in COCO format without writing Python: checked as a whole, mended where nothing is in doubt."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils import comm

from ..core.errors import ConfigError, RunError
from ..data.check import Checked, Needs, check_coco
from ..data.coco import NAMES, CocoSplit
from ..data.folders import ClassSplit
from ..data.splits import find_any_split, named_split
from ..files import cache_folder, to_json, write_atomically
from .keypoints import keypoint_metadata
from .sem_seg_datasets import errors_of_dataset

__all__ = ["register_coco_datasets"]

logger = logging.getLogger("detectron2.acam_kd.datasets")

KEY = "DATASETS.COCO_FORMAT"


def register_coco_datasets(
    datasets: Sequence[Sequence[str]],
    *,
    output_dir: str = "",
    masks: bool | None = None,
    evaluated: Collection[str] | None = None,
) -> None:
    """Register COCO-format datasets, or those of YOLO's or Pascal VOC's format, after a check of their files.

    Where something was mended, a json with the corrections is written, and it is the one that is registered. So
    training and evaluation read the same.

    The categories' keypoints, their pairs of left and right and their skeleton become metadata too. Pairs are read
    from ``keypoint_flip_map`` or ``flip_map`` of the category, as lists of two names. Without these, two names are a
    pair if they differ only by left and right.

    Args:
        datasets: ``[name, json file, image folder]`` each; of YOLO's and Pascal VOC's format ``[name, image folder,
            label folder]``, or ``[name, folder or data.yaml, split]`` with the split ``train`` or ``val``.
        output_dir: the folder of mended jsons, as the run's; else the cache's.
        masks: see ``data.check.Needs``.
        evaluated: the names of the datasets that are evaluated on; None for all. Others need no areas, and may have
            ids from 0.

    Raises:
        ConfigError: an entry is malformed, its name is taken, a file does not exist, or something in a json or an
            image cannot be used. All datasets are checked, and the first error is raised.
        RunError: a mended json cannot be written.
    """
    errors: list[ConfigError] = []
    for entry in datasets:
        if isinstance(entry, str) or len(entry) != 3:
            raise ConfigError(KEY, entry, allowed="[name, json file, image folder] for each dataset")
        name, json_file, image_root = (os.path.expanduser(str(value)) for value in entry)
        read = evaluated is None or name in evaluated
        try:
            json_file, image_root = _as_coco(name, json_file, image_root)
            checked = _check(name, json_file, image_root, Needs(masks=masks, areas=read, ids=read))
        except ConfigError as error:
            errors.append(error)
            continue
        _register(name, json_file, image_root, checked, output_dir)
    if errors:
        raise errors[0]


def _as_coco(name: str, first: str, second: str) -> tuple[str, str]:
    """Return json file and image folder; a dataset of another format is converted to a json in the cache folder."""
    if not os.path.isdir(first) and not first.endswith((".yaml", ".yml")):
        return first, second
    with errors_of_dataset(name, KEY):
        split = find_any_split(first, second) if second in NAMES else named_split(first, second)
    if not isinstance(split, CocoSplit):
        if isinstance(split, ClassSplit):
            raise ConfigError(KEY, f"{name}: a class for each image in {split.image_root}", "boxes")
        raise ConfigError(KEY, f"{name}: label PNGs in {split.label_root}", "boxes", "give them by --sem-seg-dataset")
    return split.json_file, split.image_root


def _check(name: str, json_file: str, image_root: str, needs: Needs) -> Checked:
    main = comm.is_main_process()
    with errors_of_dataset(name, KEY):
        return check_coco(
            json_file,
            image_root,
            name=name,
            needs=needs,
            reader="detectron2",
            say=logger.warning if main else lambda line: None,
        )


def _register(name: str, json_file: str, image_root: str, checked: Checked, output_dir: str) -> None:
    used = _write_mended(name, checked.content, output_dir) if checked.mended else json_file
    if name in DatasetCatalog.list():
        known = MetadataCatalog.get(name)
        if (known.get("source_json", None), known.get("image_root", None)) != (json_file, image_root):
            raise ConfigError(KEY, f"dataset {name}, a name that is taken", allowed="a new name for other files")
        if known.json_file == used:
            return
        DatasetCatalog.remove(name)  # the mended json of another run
        MetadataCatalog.remove(name)
    register_coco_instances(name, keypoint_metadata(checked.content), used, image_root)
    by_id = sorted(checked.content["categories"], key=lambda category: category["id"])  # Detectron2's order
    MetadataCatalog.get(name).set(thing_classes=[category["name"] for category in by_id], source_json=json_file)


def _write_mended(name: str, content: dict[str, Any], output_dir: str) -> str:
    """Write a mended json, and return the file."""
    folder = Path(output_dir) if output_dir else cache_folder() / "mended"
    file = folder / f"mended_{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}.json"
    text = to_json(content)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.is_file() or file.read_text() != text:  # several processes write the same
            write_atomically(file, text)
    except OSError as error:
        raise RunError(
            f"the mended json of dataset {name} cannot be written ({error.strerror})", str(file), "choose OUTPUT_DIR"
        ) from error
    if comm.is_main_process():
        logger.warning(f"{name}: Detectron2 reads the mended json {file}")
    return str(file)
