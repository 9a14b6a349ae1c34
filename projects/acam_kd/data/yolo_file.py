"""The yaml file of a dataset in YOLO's format: the names of the classes, and where the images of a split are."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..core.errors import ConfigError
from ..yaml_file import parse_yaml, problem_of
from .convert import files_below

__all__ = ["Named", "YoloFile", "read_yolo_file"]

KEYS = {"train": ("train",), "val": ("val", "valid", "validation", "test")}
NUMBER = re.compile(r"[0-9]{1,6}")

logger = logging.getLogger("acam_kd")


@dataclass(frozen=True)
class Named:
    """The images of a split, and the line of the yaml file that names them."""

    line: int
    paths: tuple[Path, ...]
    folders: bool
    """True if whole folders are named, and no image by itself."""


@dataclass(frozen=True)
class YoloFile:
    """The content of a ``data.yaml``."""

    path: Path
    names: tuple[str, ...]
    """The names of class 0, 1, ..."""
    keypoints: int
    """The number of values of keypoints after each box."""
    root: Path
    """The folder that paths are relative to."""
    entries: Mapping[str, tuple[int, tuple[str, ...]]]
    """Key -> its line, and the folders, lists or images that it names."""

    def images(self, split: str) -> Named | None:
        """Find the images of a split; None if the file does not name them.

        Raises:
            ConfigError: a folder, a list or an image does not exist; the error names file and line.
        """
        key = next((key for key in KEYS.get(split, ()) if key in self.entries), None)
        if key is None:
            return None
        line, values = self.entries[key]
        found: list[Path] = []
        places = [self._place(f"{self.path}:{line}: {key}", value) for value in values]
        for place in places:
            if place.is_dir():
                found += files_below(place)
            else:
                found += self._listed(place) if place.suffix == ".txt" else [place]
        return Named(line, tuple(found), all(place.is_dir() for place in places))

    def _place(self, where: str, value: str) -> Path:
        place = _resolve(value, self.root, self.path.parent)
        if place is None:
            allowed = f"a folder of images, or a list of them, in {self.root.absolute()}"
            raise ConfigError("dataset", f"{where} {value}, which does not exist", allowed)
        return place

    def _listed(self, file: Path) -> Iterator[Path]:
        for number, line in enumerate(file.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
            if line.strip():
                place = _resolve(line.strip(), file.parent, self.root)
                if place is None:
                    raise ConfigError("dataset", f"{file}:{number}: no image {line.strip()}", "an existing image")
                yield place


def _resolve(value: str, *folders: Path) -> Path | None:
    """Find a path below one of some folders; the first parts of the path may be those of another machine."""
    parts = Path(value).parts
    for place in [Path(value)] if Path(value).is_absolute() else [folder / value for folder in folders]:
        if os.path.exists(place):
            return place
    for start in range(1, len(parts)):
        for folder in folders:
            place = folder.joinpath(*parts[start:])
            if ".." not in parts[start:] and os.path.exists(place):
                return place
    return None


def read_yolo_file(path: Path) -> YoloFile:
    """Read a ``data.yaml``.

    Raises:
        ConfigError: it is no yaml, or its names or other entries cannot be used; the error names file and line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        parsed = parse_yaml(text, yaml.BaseLoader)  # all values stay text: yes and no are names
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError("dataset", problem_of(error, path), "a yaml file as YOLO's") from error
    content = parsed.content
    if not isinstance(content, dict) or "names" not in content:
        raise ConfigError("dataset", f"{path} without 'names'", "a yaml file with the names of the classes")
    lines = {key.value: key.start_mark.line + 1 for key, _ in parsed.node.value}  # type: ignore[union-attr]
    root = _root(path, content.get("path", ""))
    entries = {key: (lines[key], _texts(content[key])) for keys in KEYS.values() for key in keys if content.get(key)}
    where = f"{path}:{lines['names']}: names"
    names = _names(where, content["names"])
    if content.get("nc", len(names)) not in (len(names), str(len(names))):
        raise ConfigError("dataset", f"{where}: {len(names)} of them beside nc: {content['nc']}", "as many names as nc")
    keypoints = _keypoints(f"{path}:{lines.get('kpt_shape')}", content.get("kpt_shape"))
    if keypoints:
        logger.warning("%s: keypoints are not read, the boxes of the objects are", path)
    return YoloFile(path, names, keypoints, root, entries)


def _root(path: Path, value: Any) -> Path:
    for place in (path.parent / str(value), Path(str(value))):
        if value and place.is_dir():
            return place
    return path.parent


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else (str(value),)


def _names(where: str, value: Any) -> tuple[str, ...]:
    """Return the names by number, of a list or of a dict from numbers."""
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not NUMBER.fullmatch(str(key))]:
            raise ConfigError("dataset", f"{where}: key {wrong[0]}", "class numbers from 0")
        by_number = {int(key): name for key, name in value.items()}
        value = [by_number.get(number, "") for number in range(len(by_number))]
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ConfigError("dataset", f"{where}: {value}", "a list of names, or names by number")
    names = [str(name).strip() if isinstance(name, str) else "" for name in value]
    for number, name in enumerate(names):
        if not name:
            raise ConfigError("dataset", f"{where}: none for class {number}", "a name for each number from 0")
        if name in names[:number]:
            raise ConfigError("dataset", f"{where}: {name} for {names.index(name)} and {number}", "different names")
    return tuple(names)


def _keypoints(where: str, shape: Any) -> int:
    if not shape:
        return 0
    if not (isinstance(shape, list) and len(shape) == 2 and all(NUMBER.fullmatch(str(value)) for value in shape)):
        raise ConfigError("dataset", f"{where}: kpt_shape {shape}", "[number of keypoints, 2 or 3]")
    return int(shape[0]) * int(shape[1])
