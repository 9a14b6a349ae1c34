"""Folders of images that nobody labelled: their files, the checks of all data, and images of the validation data."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, first_line
from .check.findings import Findings
from .check.look import check_depth, check_header, headers_of, look_at
from .convert import files_below
from .images import AUTO, read_rgb
from .labels import IMAGES

__all__ = ["check_images", "find_images", "refuse_shared"]

logger = logging.getLogger("acam_kd")

ARGUMENT = "unlabelled"


def find_images(folders: Sequence[str]) -> dict[str, list[str]]:
    """List the images at any depth below folders; hidden files are left out.

    Returns:
        Folder -> paths, in order.

    Raises:
        ConfigError: a folder does not exist, has no image, or lies inside of another one.
    """
    found: dict[str, list[str]] = {}
    for folder in map(os.path.expanduser, folders):
        where = os.path.abspath(folder)
        if not os.path.isdir(folder):
            raise ConfigError(ARGUMENT, f"no folder {where}", "folders of images")
        images = list(map(str, files_below(Path(folder))))
        if not images:
            raise ConfigError(ARGUMENT, f"no images in {where}", f"files named {' '.join(IMAGES)}")
        found[folder] = images
    real = sorted(os.path.realpath(folder) + os.sep for folder in folders)
    for outer, inner in zip(real, real[1:]):
        if inner.startswith(outer):
            raise ConfigError(ARGUMENT, f"{inner} inside of {outer}", "folders that have no image in common")
    return found


def check_images(paths: Sequence[str], *, image_range: str = AUTO, reader: str = "") -> None:
    """Check every image, as those with labels are checked: that it can be read, its mode, its range, its proportions.

    Args:
        paths: the images.
        image_range, reader: see ``check_coco``.

    Raises:
        ConfigError: some cannot be used; all of them were logged before.
    """
    findings = Findings("unlabelled images")
    headers = [header for _, header in headers_of(paths, _root(paths), "unlabelled images:")]
    for path, header in zip(paths, headers):
        where = f"image {os.path.abspath(path)}"
        if header is None:
            findings.refuse("image file", f"{where},", "which does not exist any more")
        else:
            check_header(header, where, findings, image_range=image_range, reader=reader)
    known = [header for header in headers if header is not None]
    check_depth(known, findings, image_range=image_range, reader=reader)
    try:
        findings.raise_if_any(logger.info)
    except ConfigError as error:
        raise ConfigError(ARGUMENT, error.value, error.allowed, error.hint) from error
    findings.tell(logger.info)


def refuse_shared(paths: Sequence[str], validation: Sequence[str], *, image_range: str = AUTO) -> None:
    """Refuse images that the validation data has too, whatever their names are: the results would not be of new images.

    Decoded pixels are compared, so a copy in another lossless format is found. One that was compressed again or
    resized is not.

    Args:
        paths: the unlabelled images.
        validation: the images to evaluate on.
        image_range: see ``images.RANGES``.

    Raises:
        ConfigError: there are such images.
    """
    sizes = _sizes(validation)
    own = {path: size for path, size in _sizes(paths).items() if size in set(sizes.values())}
    suspects = [path for path, size in sizes.items() if size in set(own.values())]
    known: dict[str, str] = {}
    for path, digest in _digests(suspects, image_range).items():
        known.setdefault(digest, path)
    shared = [(path, known[d]) for path, d in _digests([*own], image_range).items() if d in known]
    if shared:
        first, other = map(os.path.abspath, shared[0])
        same = "the first is" if first == other else f"the first, {first}, is"
        raise ConfigError(
            ARGUMENT, f"{len(shared)} of {len(paths)} images that are validation images, {same} {other}",
            "none of them", "take them out: what is measured on them would not be the quality on new images",
        )  # fmt: skip


def _root(paths: Sequence[str]) -> str:
    return os.path.commonpath([os.path.abspath(os.path.dirname(path)) for path in paths])


def _sizes(paths: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return width and height of the images that can be read."""
    headers = headers_of(paths, _root(paths), "images:") if paths else []
    return {p: (h.width, h.height) for p, (_, h) in zip(paths, headers) if h is not None and not h.problem}


def _digests(paths: Sequence[str], image_range: str) -> dict[str, str]:
    """Return the hash of the pixels of the images that can be read."""
    if not paths:
        return {}
    read = partial(_digest, image_range=image_range)
    looked = look_at(paths, read, kind=f"pixels_{image_range}", root=_root(paths), words="contents of images:")
    return {path: facts[0] for path, (_, facts) in zip(paths, looked) if facts and not facts[-1]}


def _digest(path: str, image_range: str) -> list[Any]:
    """Return the hash of the pixels and the problem of an image: see ``look_at``."""
    try:
        pixels = read_rgb(path, image_range)
    except ConfigError as error:
        return ["", first_line(error)]
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(pixels.tobytes())
    return [digest.hexdigest(), ""]
