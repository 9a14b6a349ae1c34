"""One annotated dataset, divided into images to train on and images to validate on."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError
from ..files import cache_folder, sha256, write_atomically
from .coco import CocoSplit

__all__ = ["Division", "check_same", "choose", "divide"]

PARTS = {"train": "split_train.json", "val": "split_val.json"}
SHOWN = 10

logger = logging.getLogger("acam_kd")


@dataclass(frozen=True)
class Division:
    """The arguments that decide how a dataset is divided.

    Args:
        val_fraction: the part of the images to validate on, between 0 and 1.
        split_seed: decides which.
        group_by: a regular expression, searched for in each file name. Images whose first group is the same text stay
            on one side. Without a group in it the whole match counts. Empty to let each image stand alone.
    """

    val_fraction: float
    split_seed: int = 0
    group_by: str = ""

    def group(self, file_name: str) -> str:
        """Return the group of an image.

        Raises:
            ConfigError: the expression is none, or is not in the name.

        Example:
            >>> Division(0.2, group_by=r"^([^_]+)_").group("scene3_0012.jpg")
            'scene3'
        """
        if not self.group_by:
            return file_name
        try:
            match = re.search(self.group_by, file_name)
        except re.error as error:
            raise ConfigError(
                "group_by", f"{self.group_by} ({error})", "a regular expression with one group, as ^([^_]+)_"
            ) from error
        if match is None:
            raise ConfigError("group_by", f"{self.group_by}, which is not in {file_name}", "a part of each file name")
        return match[1] or "" if match.re.groups else match[0]


def divide(whole: CocoSplit, division: Division, folder: Path | None = None) -> dict[str, CocoSplit]:
    """Divide a dataset, and write both parts as COCO jsons; parts that are there already are used as they are.

    The same files and arguments give the same parts. An annotation without an image goes to the part to train on,
    where the checks of the data name it.

    Args:
        whole: the files of the dataset.
        division: how to divide.
        folder: of the run; the cache folder if left out.

    Returns:
        ``"train"`` and ``"val"``, with the images where they were.

    Raises:
        ConfigError: the json cannot be divided, or the folder has parts of something else or cannot be written.
    """
    if not 0 < division.val_fraction < 1:
        raise ConfigError("val_fraction", division.val_fraction, "between 0 and 1")
    content = _read(whole.json_file)
    asked = {**asdict(division), "data": sha256(whole.json_file)}
    if folder is None:
        name = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]
        folder = cache_folder() / "splits" / name
    files = {part: folder / name for part, name in PARTS.items()}
    if all(file.is_file() for file in files.values()):
        for file in files.values():
            check_same(file, asked)
        logger.info("the split in %s is used", folder)
    else:
        parts = _parts(content, division, whole.json_file)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for part, file in files.items():
                write_atomically(file, json.dumps({**parts[part], "acam_kd_split": asked}))
        except OSError as error:
            value = f"{folder}, which cannot be written ({error.strerror})"
            raise ConfigError("output", value, "a folder to write into") from error
    return {part: replace(whole, json_file=str(file)) for part, file in files.items()}


def _read(json_file: str) -> dict[str, Any]:
    """Read a json as far as dividing needs it; the checks of the data come later."""
    form = "a json in COCO format, with lists of images, annotations and categories"
    try:
        content = json.loads(Path(json_file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError("dataset", f"{json_file}, which cannot be read as json ({error})", form) from error
    for part in ("images", "annotations", "categories"):
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ConfigError("dataset", f"{json_file} without a list {part!r} of entries", form)
    return content  # type: ignore[no-any-return]


def check_same(file: Path, asked: Mapping[str, Any]) -> None:
    """Refuse parts that were made of other data or in another way.

    Args:
        file: a part, or the record of both.
        asked: the division and the data of this run.

    Raises:
        ConfigError: the file says something else, or nothing.
    """
    try:
        was = json.loads(file.read_text(encoding="utf-8-sig"))["acam_kd_split"]
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError("output", f"{file}, which is no part of a split", "a folder without it") from error
    for name, value in asked.items():
        if was.get(name) != value:
            shown = "data that changed since its split was made" if name == "data" else value
            allowed = "the same data" if name == "data" else f"{was.get(name)!r}"
            hint = "choose another {output}, or delete what begins with split_ there"
            raise ConfigError(name, shown, f"{allowed}, as in {file}", hint)


def _parts(content: dict[str, Any], division: Division, name: str) -> dict[str, dict[str, Any]]:
    images, annotations = content["images"], content["annotations"]
    group_of = {_key(image.get("id")): division.group(str(image.get("file_name", ""))) for image in images}
    sizes = Counter(division.group(str(image.get("file_name", ""))) for image in images)
    classes: dict[str, set[str]] = {group: set() for group in sizes}
    for entry in annotations:
        group = group_of.get(_key(entry.get("image_id")))
        if group is not None and not entry.get("iscrowd"):
            classes[group].add(_key(entry.get("category_id")))
    if len(sizes) < 2:
        argument = "group_by" if division.group_by else "dataset"
        raise ConfigError(argument, f"{len(sizes)} group of images in {name}", "at least 2, to divide them")
    chosen = choose(sizes, classes, division)
    of_val = {key for key, group in group_of.items() if group in chosen}
    parts = {}
    for part in PARTS:
        mine = [image for image in images if (_key(image.get("id")) in of_val) == (part == "val")]
        theirs = [entry for entry in annotations if (_key(entry.get("image_id")) in of_val) == (part == "val")]
        parts[part] = {**content, "images": mine, "annotations": theirs}
    _report(parts, len(sizes) - len(chosen), len(chosen), name)
    return parts


def _key(value: Any) -> str:
    """Return an id as text, the same for 1, 1.0 and "1"."""
    try:
        number = float(value)
        return str(int(number)) if number.is_integer() else str(value)
    except (TypeError, ValueError, OverflowError):
        return str(value)


def choose(sizes: Mapping[str, int], classes: Mapping[str, set[str]], division: Division) -> set[str]:
    """Choose the groups to validate on.

    The groups stand in an order that the seed decides. First every class gets the first group that has it, the rarest
    class before the others. Then groups follow while they fit into the fraction. No class loses its last group to
    train on, unless nothing else is left to choose.

    Args:
        sizes: group -> its number of images; two groups at least.
        classes: group -> the classes of its objects.
        division: the fraction and the seed.

    Returns:
        Names of groups, at least one and not all.
    """
    order = sorted(sizes, key=lambda group: hashlib.sha256(f"{division.split_seed}:{group}".encode()).digest())
    wanted = max(1, round(division.val_fraction * sum(sizes.values())))
    having = Counter(name for group in order for name in classes[group])
    left, chosen, covered = Counter(having), set[str](), set[str]()

    def may(group: str) -> bool:
        alone = len(chosen) + 1 == len(order)
        return group not in chosen and not alone and all(left[name] > 1 for name in classes[group])

    def take(group: str) -> None:
        chosen.add(group)
        covered.update(classes[group])
        left.subtract(classes[group])

    for name in sorted(having, key=lambda name: (having[name], name)):
        candidates = [group for group in order if name in classes[group] and may(group)] if name not in covered else []
        if candidates:
            take(min(candidates, key=lambda group: max(sizes[group], wanted)))
    total = sum(sizes[group] for group in chosen)
    for group in order:
        if total + sizes[group] <= wanted and may(group):
            take(group)
            total += sizes[group]
    if not chosen:
        take(min([group for group in order if may(group)] or order, key=lambda group: sizes[group]))
    return chosen


def _report(parts: Mapping[str, Mapping[str, Any]], train: int, val: int, name: str) -> None:
    """Log the number of images and objects of each part, and classes that are missing in one."""
    counts = {p: Counter(_key(entry.get("category_id")) for entry in parts[p]["annotations"]) for p in parts}
    names = {_key(category.get("id")): str(category.get("name")) for category in parts["train"]["categories"]}
    logger.info(
        "%s: %d images (%d groups) to train on, %d (%d groups) to validate on; objects: %s",
        name, len(parts["train"]["images"]), train, len(parts["val"]["images"]), val,
        _listed([f"{names[key]} {counts['train'][key]} + {counts['val'][key]}" for key in names]),
    )  # fmt: skip
    for part, other in (("train", "val"), ("val", "train")):
        missing = [names[key] for key in names if counts[other][key] and not counts[part][key]]
        if missing:
            words = {"train": "train on", "val": "validate on"}[part]
            logger.warning(
                "%s: no object to %s of %s, which too few groups of images have", name, words, _listed(missing)
            )


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:SHOWN]) + (f" and {len(words) - SHOWN} more" if len(words) > SHOWN else "")
