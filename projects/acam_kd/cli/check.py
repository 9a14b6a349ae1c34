"""``acam-kd check``: the check of a dataset alone, as a run makes it before anything is built."""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, RunError
from ..data.check import Needs, check_coco, check_labels
from ..data.coco import CocoSplit
from ..data.folders import ClassSplit
from ..data.labels import find_pairs
from ..data.splits import LabelSplit, Split
from ..fields import instance, option
from ..files import to_json, write_atomically
from .command import Command, Values
from .data import Data

__all__ = ["COMMAND"]

logger = logging.getLogger("acam_kd")

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Check:
    """The options that only this command has."""

    folder: str = option("", flag="DATA", nargs="?", metavar="DATA", help="the same as --data")
    masks: bool = option(False, help="every annotation has to have a segmentation")
    engine: str = option("torchvision", choices=("torchvision", "detectron2"), help="who reads the images")
    fix: Path | None = option(
        None, type=Path, metavar="OUT.json", help="write the mended json; of two splits OUT_train.json, OUT_val.json"
    )


def run(values: Values) -> None:
    """Check the splits that are there, and print a line for each.

    Raises:
        ConfigError: no split is there, or one of them cannot be used. All are checked first.
        RunError: the mended json cannot be written.
    """
    asked, data = instance(Check, values), instance(Data, values)
    splits = _splits(replace(data, data=data.data or asked.folder))
    errors: list[ConfigError] = []
    mended: dict[str, Any] = {}
    for split, files in splits.items():
        try:
            if isinstance(files, CocoSplit):
                mended[split] = _check_coco(split, files, asked)
            elif isinstance(files, ClassSplit):
                _check_classes(split, files)
            else:
                _check_labels(split, files, asked)
        except ConfigError as error:
            errors.append(error)
    if errors:
        more = f"{errors[0].hint}; the other split has troubles too: see above" if len(errors) > 1 else errors[0].hint
        if len(errors) > 1:
            logger.error(str(errors[1]))
        raise ConfigError(errors[0].argument, errors[0].value, errors[0].allowed, more.removeprefix("; "))
    if asked.fix and not mended:
        raise ConfigError("fix", asked.fix, "a dataset in COCO format", "label images are not written")
    for split, content in mended.items():
        if asked.fix:
            _write(asked.fix if len(mended) == 1 else asked.fix.with_stem(f"{asked.fix.stem}_{split}"), content)


def _splits(data: Data) -> dict[str, Split]:
    """Find the splits: those that are named by their files, else those of the folder, of which one may be missing."""
    found: dict[str, Split] = {}
    missing: list[ConfigError] = []
    for name in SPLITS:
        if not data.data and not getattr(data, name):
            continue
        try:
            found[name] = data.split(name)
        except ConfigError as error:
            if error.argument != "data":
                raise
            missing.append(error)
    if not found:
        raise missing[0] if missing else ConfigError("data", "nothing", "the folder of a dataset", "or --train, --val")
    for absent in missing:
        logger.warning(f"{absent.value}: not checked")
    return found


def _check_coco(split: str, files: CocoSplit, asked: Check) -> dict[str, Any]:
    checked = check_coco(
        files.json_file,
        files.image_root,
        name=split,
        needs=Needs(masks=asked.masks or None),
        image_range=files.image_range,
        reader=asked.engine,
    )
    content = checked.content
    numbers = ", ".join(f"{len(content[part])} {part}" for part in ("images", "annotations", "categories"))
    state = "mended, see above; a run does the same" if checked.mended else "nothing to mend"
    print(f"{split}: {numbers}: {state}")
    return content


def _check_labels(split: str, files: LabelSplit, asked: Check) -> None:
    pairs = find_pairs(files.image_root, files.label_root, name=split)
    counts = check_labels(pairs, files.classes, name=split, image_range=files.image_range, reader=asked.engine)
    total = sum(counts)
    parts = ", ".join(f"{name} {100 * count / total:.1f} %" for name, count in zip(files.classes, counts))
    print(f"{split}: {len(pairs)} images with labels: {parts}")


def _check_classes(split: str, files: ClassSplit) -> None:
    from ..tv.class_images import ClassImages

    data = ClassImages(files, size=1, name=split)
    counts = Counter(data.categories[label] for label in data.labels)
    print(f"{split}: {len(data)} images: {', '.join(f'{name} {counts[name]}' for name in data.categories.values())}")


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        write_atomically(path, to_json(content))
    except OSError as error:
        raise RunError(
            f"cannot be written ({error.strerror})", os.path.abspath(path), "choose another {fix}"
        ) from error
    print(f"the mended json: {path}")


COMMAND = Command("check", "check a dataset, as every run does first", run, (Check, Data), "acam-kd check FOLDER")
