"""The check of a dataset in COCO format: the json, every image, every annotation."""

from __future__ import annotations

import hashlib
import json
import locale
import logging
import os
from dataclasses import astuple, dataclass
from typing import Any

from ...core.errors import ConfigError
from ..coco import CONVERTED
from ..collecting import uncollected
from ..images import AUTO, Header
from .annotations import Annotations, Needs
from .cache import State, read_entry, write_entry
from .entries import check_categories, check_images
from .findings import Findings, Say
from .look import headers_of

__all__ = ["Checked", "check_coco"]

logger = logging.getLogger("acam_kd")

EVERYTHING = Needs()
PARTS = ("images", "annotations", "categories")
ALLOWED = "a json in COCO format"


@dataclass(frozen=True)
class Checked:
    """A dataset in COCO format that can be used.

    Args:
        content: of the json, mended.
        mended: what was mended -> how often.
        notices: things that are odd, and no trouble.
    """

    content: dict[str, Any]
    mended: dict[str, int]
    notices: list[str]


@uncollected()
def check_coco(
    json_file: str,
    image_root: str,
    *,
    name: str,
    needs: Needs = EVERYTHING,
    image_range: str = AUTO,
    reader: str = "",
    say: Say = logger.info,
) -> Checked:
    """Check a dataset as a whole, and mend what is not in doubt; the files stay as they are.

    Args:
        json_file: a file in COCO's instances format.
        image_root: the folder of the images.
        name: the dataset's name in messages.
        needs: the parts that a run reads.
        image_range: see ``images.RANGES``.
        reader: ``"detectron2"`` if its mapper reads the images; else they are read by ``images.read_rgb``.
        say: takes the lines of the list of troubles, or of what was mended.

    Raises:
        ConfigError: the json, the folder or an image does not exist, or something in them cannot be used. The
            error names the first troubles; all of them were said before.
    """
    data = _read(json_file, image_root, name)
    findings = Findings(f"{name}: {json_file}")
    content = _parse(data, findings)
    _check_parts(content, findings, say)
    if place := _converted_from(content):
        findings.where = f"{name}: {place}"
    entries = [image for image in content["images"] if isinstance(image, dict)]
    paths = [_path(image_root, image) for image in entries]
    looked = headers_of(paths, image_root, f"{name}: images")
    key = _key(data, json_file, [state for state, _ in looked], needs, image_range, reader)
    known = read_entry("coco", key)
    if known is None:
        headers = {id(image): (path, header) for image, path, (_, header) in zip(entries, paths, looked)}
        _check(content, headers, findings, needs, image_range, reader)
        findings.raise_if_any(say)
        write_entry("coco", key, [findings.mended, findings.notices, content if findings.mended else None])
    else:
        findings.mended, findings.notices = known[0], known[1]
        content = known[2] or content
    findings.tell(say)
    return Checked(content, findings.mended, findings.notices)


def _read(json_file: str, image_root: str, name: str) -> bytes:
    if not os.path.isfile(json_file):
        raise ConfigError("dataset", f"{name}: no file {os.path.abspath(json_file)}", allowed=ALLOWED)
    if not os.path.isdir(image_root):
        raise ConfigError("dataset", f"{name}: no folder {os.path.abspath(image_root)}", allowed="a folder of images")
    try:
        with open(json_file, "rb") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(
            "dataset", f"{name}: {json_file}, which cannot be read ({error.strerror})", ALLOWED
        ) from error


def _parse(data: bytes, findings: Findings) -> Any:
    """Read json of any encoding that json may have, with a byte order mark or without, whatever the locale is."""
    encoding = json.detect_encoding(data)
    try:
        content = json.loads(data.decode("utf-8-sig" if encoding == "utf-8" else encoding))
    except (ValueError, RecursionError) as error:
        hint = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise ConfigError("dataset", f"{findings.where}, which is not json ({error})", ALLOWED, hint) from error
    local = locale.getpreferredencoding(False).lower().replace("-", "").replace("_", "")
    if encoding != "utf-8" or (not data.isascii() and local != "utf8"):
        findings.mend("files that other readers of json cannot read here, for their encoding or byte order mark")
    return content


def _converted_from(content: dict[str, Any]) -> str:
    """Return the file or folder that a json was made of, which the user knows; empty if it is the user's own."""
    info = content.get("info")
    description = str(info.get("description", "")) if isinstance(info, dict) else ""
    return description.removeprefix(CONVERTED) if description.startswith(CONVERTED) else ""


def _check_parts(content: Any, findings: Findings, say: Say) -> None:
    if not isinstance(content, dict):
        content = {}
    for part in PARTS:
        if not isinstance(content.get(part), list):
            allowed = "lists of images, annotations and categories, as in COCO format"
            findings.refuse("parts", "", f"without a list {part!r}", allowed)
    findings.raise_if_any(say)
    for part in PARTS:
        if not content[part]:
            findings.refuse("parts", "", f"with no {part}", "at least one")
    findings.raise_if_any(say)


def _path(image_root: str, image: dict[str, Any]) -> str:
    """Return the file of an image; a name with backslashes may be a path of Windows."""
    name = image.get("file_name")
    path = os.path.join(image_root, name) if isinstance(name, str) and name else ""
    if path and "\\" in path and not os.path.lexists(path):
        other = os.path.join(image_root, str(name).replace("\\", "/"))
        return other if os.path.isfile(other) else path
    return path


def _key(data: bytes, json_file: str, states: list[State | None], needs: Needs, image_range: str, reader: str) -> str:
    """Return the key of a report in the cache: it changes with the json, with an image, and with what is asked."""
    digest = hashlib.sha256(data)
    local = locale.getpreferredencoding(False)
    digest.update(repr((states, astuple(needs), image_range, reader, local)).encode())
    return os.path.join(digest.hexdigest(), os.path.basename(json_file))


def _check(
    content: dict[str, Any],
    headers: dict[int, tuple[str, Header | None]],
    findings: Findings,
    needs: Needs,
    image_range: str,
    reader: str,
) -> None:
    """Check the parts of a json, and mend them in place."""
    sizes = check_images(content, headers, findings, image_range=image_range, reader=reader)
    categories = check_categories(content, findings)
    annotations = Annotations(sizes, categories, needs, findings)
    content["annotations"] = annotations.check(content["annotations"])
