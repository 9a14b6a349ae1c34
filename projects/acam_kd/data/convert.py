"""Datasets of other formats, converted once to a COCO json in the cache folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..core.errors import ConfigError, RunError
from ..files import cache_folder, write_atomically
from .coco import CONVERTED, CocoSplit
from .images import image_size
from .labels import IMAGES

__all__ = ["FilePairs", "Reader", "Thing", "cached", "convert", "files_below", "has_files", "outside", "refuse_strays"]

VERSION = 1
"""Raised when the conversion changes, so that what older versions wrote is not used."""
SHOWN = 10

logger = logging.getLogger("acam_kd")


@dataclass(frozen=True)
class Thing:
    """One annotated object."""

    number: int
    """Its class, from 0."""
    box: tuple[float, float, float, float]
    """x, y, width, height in pixels."""
    polygon: tuple[float, ...] = ()
    """x, y, x, y, ... in pixels; empty if there is a box only."""
    crowd: bool = False


class Reader(Protocol):
    """Reads the files of one format; a frozen dataclass, whose fields are all that decides the result."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes."""
        ...

    def read(self, path: Path, width: int, height: int) -> list[Thing]:
        """Read the objects of an image from its label file.

        Raises:
            ConfigError: something in the file cannot be used; it names file and line.
        """
        ...


@dataclass(frozen=True)
class FilePairs:
    """The images of a split, each with the place of its label file, and the reader of these files."""

    place: str
    """The file or folder that names them, for messages."""
    pairs: tuple[tuple[Path, Path], ...]
    reader: Reader


def _walk(root: Path, suffixes: Sequence[str]) -> Iterator[str]:
    for folder, _, names in os.walk(root, followlinks=True):
        for name in names:
            if name[0] != "." and name.lower().endswith(tuple(suffixes)):
                yield os.path.join(folder, name)


def files_below(root: Path, suffixes: Sequence[str] = IMAGES) -> list[Path]:
    """List the files below a folder by path, hidden ones left out. Links to folders are followed."""
    return [Path(path) for path in sorted(_walk(root, suffixes))]


def has_files(root: Path, suffix: str) -> bool:
    """Return True if any file of a suffix is below a folder."""
    return any(True for _ in _walk(root, (suffix,)))


def refuse_strays(labels: Iterable[Path], pairs: Iterable[tuple[Path, Path]], images: Path) -> None:
    """Refuse label files without an image.

    Raises:
        ConfigError: there are some.
    """
    strays = sorted({*labels} - {label for _, label in pairs})
    if strays:
        more = f", and {len(strays) - 1} more" if len(strays) > 1 else ""
        allowed = f"an image of that name in {images}"
        raise ConfigError(
            "dataset", f"{strays[0]} without its image{more}", allowed, "add it, or delete the label file"
        )


def outside(box: Sequence[float], width: int, height: int) -> bool:
    """Return True for a box (x, y, width, height) that does not even touch its image."""
    x, y, w, h = box
    return x >= width or y >= height or x + w < 0 or y + h < 0


def convert(source: FilePairs) -> CocoSplit:
    """Convert a split to a COCO json, or find the json of an earlier conversion.

    Class number n becomes the category with id n + 1. An image without a label file has no objects.

    Args:
        source: images and label files.

    Returns:
        The json in the cache folder, and the folder of the images.

    Raises:
        ConfigError: there are no images or no label files, or some of them cannot be used.
        RunError: the cache folder cannot be written.
    """
    if not source.pairs:
        raise ConfigError("dataset", f"{source.place} with no images", f"files named {' '.join(IMAGES)}")
    without = [image for image, label in source.pairs if not label.is_file()]
    if len(without) == len(source.pairs):
        image, label = source.pairs[0]
        raise ConfigError(
            "dataset",
            f"{source.place} with {len(without)} images and no label file, the first is {image}",
            f"its label file at {label}",
        )
    if without:
        logger.info(
            "%s: %d of %d images have no label file, so no objects; the first is %s",
            source.place, len(without), len(source.pairs), without[0],
        )  # fmt: skip
    if missing := [image for image, _ in source.pairs if not image.is_file()]:
        raise ConfigError("dataset", f"{source.place}: no image {missing[0]}", "an existing image")
    root = _root([image for image, _ in source.pairs])

    def content() -> Iterable[bytes]:
        yield repr((VERSION, source.reader)).encode()
        for image, label in source.pairs:
            yield os.fsencode(f"{os.path.relpath(image, root)} {image.stat().st_size}")
            yield label.read_bytes() if label.is_file() else b""

    return CocoSplit(str(cached(content(), lambda: _coco(source, root))), str(root))


def _root(images: Iterable[Path]) -> Path:
    """Return the folder that all images are below."""
    folders = {image.parent for image in images}
    try:
        return Path(os.path.commonpath(folders))
    except ValueError:  # some are named from the root of the file system
        return Path(os.path.commonpath([folder.absolute() for folder in folders]))


def cached(parts: Iterable[bytes], make: Any) -> Path:
    """Find the json made of the same parts before, or make and write it.

    Args:
        parts: everything that decides the content; the file is named by their hash.
        make: returns the content.

    Raises:
        RunError: the cache folder cannot be written.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    folder = cache_folder() / "converted"
    path = folder / f"{digest.hexdigest()[:32]}.json"
    if not path.is_file():
        text = json.dumps(make())
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
        except OSError as error:
            raise RunError(
                f"writing failed ({error.strerror or error})",
                where=str(path),
                remedy="set ACAM_KD_CACHE to a folder that can be written",
            ) from error
    return path


def _coco(source: FilePairs, root: Path) -> dict[str, Any]:
    """Read all images' headers and all label files; report all that is wrong at once."""
    logger.info("%s: %d images and their label files are converted", source.place, len(source.pairs))
    errors: list[ConfigError] = []
    with ThreadPoolExecutor() as pool:
        read = list(pool.map(lambda pair: _read(source.reader, *pair), source.pairs))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, ((image, _), found) in enumerate(zip(source.pairs, read), 1):
        if isinstance(found, ConfigError):
            errors.append(found)
            continue
        width, height, things = found
        name = Path(os.path.relpath(image, root)).as_posix()
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for thing in things:
            annotations.append({"id": len(annotations) + 1, "image_id": number, **_annotation(thing)})
    if errors:
        raise _together(errors)
    categories = [{"id": number, "name": name} for number, name in enumerate(source.reader.names, 1)]
    info = {"description": f"{CONVERTED}{source.place}"}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}


def _read(reader: Reader, image: Path, label: Path) -> tuple[int, int, list[Thing]] | ConfigError:
    try:
        height, width = image_size(str(image))
    except ConfigError as error:
        return error
    try:
        return width, height, reader.read(label, width, height) if label.is_file() else []
    except ConfigError as error:
        return error


def _annotation(thing: Thing) -> dict[str, Any]:
    box = [round(value, 4) for value in thing.box]
    entry = {"category_id": thing.number + 1, "bbox": box, "area": box[2] * box[3], "iscrowd": int(thing.crowd)}
    if thing.polygon:
        xs, ys = thing.polygon[::2], thing.polygon[1::2]
        turned = zip(xs, ys, [*xs[1:], xs[0]], [*ys[1:], ys[0]])
        entry["area"] = abs(sum(x * next_y - next_x * y for x, y, next_x, next_y in turned)) / 2
        entry["segmentation"] = [[round(value, 4) for value in thing.polygon]]
    return entry


def _together(errors: Sequence[ConfigError]) -> ConfigError:
    """Log the first errors, and return the first of all with their number."""
    first = errors[0]
    if len(errors) == 1:
        return ConfigError("dataset", first.value, first.allowed, first.hint)
    for error in errors[:SHOWN]:
        logger.error("%s, expected %s", error.value, error.allowed)
    value = f"{len(errors)} files that cannot be used, the first is {first.value}"
    return ConfigError("dataset", value, first.allowed, first.hint)
