"""Images with label PNGs, divided: two folders of links for each part."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from ..core.errors import ConfigError
from ..files import cache_folder, write_atomically
from .division import Division, check_same, choose
from .labels import IGNORED, find_pairs, read_label
from .splits import LabelSplit

__all__ = ["divide_labels"]

RECORD = "split_labels.json"
PARTS = ("train", "val")

logger = logging.getLogger("acam_kd")


def divide_labels(whole: LabelSplit, division: Division, folder: Path | None = None) -> dict[str, LabelSplit]:
    """Divide images with label PNGs; parts that are there already are used as they are.

    ``split_train/images``, ``split_train/labels`` and the same of ``split_val`` get links to the files.

    Args:
        whole: the folders of the dataset.
        division: how to divide; groups are looked for in the images' paths below their folder.
        folder: of the run; the cache folder if left out.

    Returns:
        ``"train"`` and ``"val"``.

    Raises:
        ConfigError: the dataset cannot be divided, or the folder has parts of something else or cannot be written.
    """
    if not 0 < division.val_fraction < 1:
        raise ConfigError("val_fraction", division.val_fraction, "between 0 and 1")
    pairs = find_pairs(whole.image_root, whole.label_root, name="dataset")
    asked = {**asdict(division), "data": _digest(whole, pairs)}
    if folder is None:
        folder = cache_folder() / "splits" / hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]
    record = folder / RECORD
    parts = {
        part: replace(
            whole, image_root=str(folder / f"split_{part}/images"), label_root=str(folder / f"split_{part}/labels")
        )
        for part in PARTS
    }
    if record.is_file():
        check_same(record, asked)
        logger.info("the split in %s is used", folder)
        return parts
    chosen = _chosen(whole, pairs, division)
    try:
        for number, (image, label) in enumerate(pairs):
            part = parts["val" if number in chosen else "train"]
            _link(Path(image), Path(part.image_root) / os.path.relpath(image, whole.image_root))
            _link(Path(label), Path(part.label_root) / os.path.relpath(label, whole.label_root))
        write_atomically(record, json.dumps({"acam_kd_split": asked}))
    except OSError as error:
        value = f"{folder}, which cannot be written ({error.strerror})"
        raise ConfigError("output", value, "a folder to write into, with links to files") from error
    logger.info("%s: %d images to train on, %d to validate on", whole.image_root, len(pairs) - len(chosen), len(chosen))
    return parts


def _link(file: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)  # of a division that was broken off
    link.symlink_to(file.absolute())


def _digest(whole: LabelSplit, pairs: Sequence[tuple[str, str]]) -> str:
    """Return a hash of the names and sizes of all files."""
    digest = hashlib.sha256()
    for image, label in pairs:
        sizes = os.path.getsize(image), os.path.getsize(label)
        digest.update(repr((os.path.relpath(image, whole.image_root), sizes)).encode())
    return digest.hexdigest()


def _chosen(whole: LabelSplit, pairs: Sequence[tuple[str, str]], division: Division) -> set[int]:
    """Return the numbers of the images to validate on."""
    groups = [division.group(Path(os.path.relpath(image, whole.image_root)).as_posix()) for image, _ in pairs]
    sizes = Counter(groups)
    if len(sizes) < 2:
        argument = "group_by" if division.group_by else "dataset"
        raise ConfigError(argument, f"{len(sizes)} group of images in {whole.image_root}", "at least 2, to divide them")
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda pair: _classes(pair[1]), pairs))
    classes: Mapping[str, set[str]] = {group: set() for group in sizes}
    for group, names in zip(groups, found):
        classes[group].update(names)
    chosen = choose(sizes, classes, division)
    return {number for number, group in enumerate(groups) if group in chosen}


def _classes(label: str) -> set[str]:
    return {str(value) for value in np.unique(read_label(label)) if value != IGNORED}
