"""The images and categories of a COCO json: ids, names, sizes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..images import SIDEWAYS, Header
from .findings import Findings, shown
from .look import check_depth, check_header
from .values import identity, number, whole

__all__ = ["check_categories", "check_images"]

Size = tuple[int, int]
Headers = dict[int, tuple[str, Header | None]]
"""``id()`` of an entry -> its file and the header of that file."""


def check_images(
    content: dict[str, Any], headers: Headers, findings: Findings, *, image_range: str, reader: str
) -> dict[int | str, Size | None]:
    """Check the list of images and their files, and mend it in place.

    Returns:
        Image id -> width and height; None for an image whose own size is in doubt.
    """
    kept = _check_ids(content["images"], "images", findings)
    sizes: dict[int | str, Size | None] = {}
    for index, image in kept:
        place = f"images[{index}] (id {shown(image['id'])})" if "id" in image else f"images[{index}]"
        path, header = headers[id(image)]
        size = _declared(image, header, place, findings)
        if not isinstance(image.get("file_name"), str) or not image["file_name"]:
            findings.refuse("file_name", place, _missing(image, "file_name"), "a text")
        else:
            size = _check_file(image, path, header, place, size, findings, image_range, reader)
        if isinstance(image.get("id"), (int, str)):
            sizes[image["id"]] = size
    found = [header for _, header in headers.values() if header is not None]
    check_depth(found, findings, image_range=image_range, reader=reader)
    content["images"] = [image for _, image in kept]
    return sizes


def check_categories(content: dict[str, Any], findings: Findings) -> set[int]:
    """Check the list of categories, and mend it in place; return their ids."""
    kept = _check_ids(content["categories"], "categories", findings)
    for index, category in kept:
        place, name = f"categories[{index}]", category.get("name")
        if "id" in category and not isinstance(category["id"], int):
            findings.refuse("categories", place, f"with id {shown(category['id'])}", "a whole number")
        if isinstance(name, (int, float)) and not isinstance(name, bool) and number(name) is not None:
            category["name"] = str(name)
            findings.mend("categories whose name is a number, taken as a text")
        elif not isinstance(name, str) or not name:
            findings.refuse("categories", place, _missing(category, "name"), "a name")
    content["categories"] = [category for _, category in kept]
    names = [str(category.get("name")) for _, category in kept]
    double = [name for name, times in Counter(names).items() if times > 1]
    if double:
        findings.notices.append(f"several categories are called {', '.join(double[:5])}")
    return {category["id"] for _, category in kept if isinstance(category.get("id"), int)}


def _missing(entry: dict[str, Any], key: str) -> str:
    return f"with {key} {shown(entry[key])}" if key in entry else f"without {key!r}"


def _check_ids(entries: Sequence[Any], part: str, findings: Findings) -> list[tuple[int, dict[str, Any]]]:
    """Check the ids of a part, and write them as they should be; leave out entries that are there twice.

    Returns:
        The index in the json and the entry, for every entry that is kept.
    """
    kept: list[tuple[int, dict[str, Any]]] = []
    seen: dict[int | str, dict[str, Any]] = {}
    # If one id of an image is a text, all are: numbers and texts cannot be sorted.
    texts = part == "images" and any(type(identity(x.get("id"))) is str for x in entries if isinstance(x, dict))
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            findings.refuse(part, f"{part}[{index}]", f"that is {shown(entry)}", "an object of json")
            continue
        found = identity(entry.get("id"))
        if found is not None and texts:
            found = entry["id"] if type(entry["id"]) is str else str(found)
        if found is None:
            findings.refuse(part, f"{part}[{index}]", _missing(entry, "id"), "a number or a text")
        elif type(found) is not type(entry["id"]):
            entry["id"] = found
            findings.mend(f"{part} with an id {'that is no text' if texts else 'written as text or with a point'}")
        if found is not None and found in seen:
            if seen[found] == entry:
                findings.mend(f"{part} that are there twice, left out")
                continue
            findings.refuse(part, f"{part}[{index}]", f"with id {shown(found)}, as another one", "an id for each")
        elif found is not None:
            seen[found] = entry
        kept.append((index, entry))
    return kept


def _declared(image: dict[str, Any], header: Header | None, place: str, findings: Findings) -> Size | None:
    """Return the size that the json says, or the file's own where it says none."""
    sides = []
    for key in ("width", "height"):
        value = image.get(key)
        if value is None and header is not None and not header.problem:
            image[key] = value = getattr(header, key)
            findings.mend(f"images without {key}, taken from the file")
        side = whole(value)
        if side is None or side < 1:
            if value is not None or header is not None and not header.problem:
                findings.refuse(key, place, _missing(image, key), "a whole number")
            continue
        if type(value) is not int:
            image[key] = side
            findings.mend(f"images with {key} written as text or with a point")
        sides.append(side)
    return (sides[0], sides[1]) if len(sides) == 2 else None


def _check_file(
    image: dict[str, Any],
    path: str,
    header: Header | None,
    place: str,
    size: Size | None,
    findings: Findings,
    image_range: str,
    reader: str,
) -> Size | None:
    """Check the file of an image; return the size if file and json agree on it."""
    full = os.path.abspath(path) if "\0" not in path else shown(path)
    if header is None:
        findings.refuse("image file", place, f"without its file {full}", "every image in its place")
        return size
    image_place = f"{place}: {full}"
    if not check_header(header, image_place, findings, image_range=image_range, reader=reader):
        return size
    if path.endswith(image["file_name"].replace("\\", "/")) and not path.endswith(image["file_name"]):
        image["file_name"] = image["file_name"].replace("\\", "/")
        findings.mend("images with backslashes in file_name")
    found = (header.width, header.height)
    if size is None or found == size:
        return size
    turned = header.orientation in SIDEWAYS and found[::-1] == size
    hint = "its EXIF orientation turns it: save it without, or correct size and boxes" if turned else ""
    findings.refuse(
        "size of image", image_place, f"with {found[0]} x {found[1]} pixels",
        f"{size[0]} x {size[1]}, as the json says", hint,
    )  # fmt: skip
    return None
