"""The boxes of a COCO json: four numbers, inside of their image, and all in COCO's form."""

from __future__ import annotations

from typing import Any

from .findings import Findings, shown
from .values import number

__all__ = ["Boxes", "form_of"]

Size = tuple[int, int]
BOX = "[x, y, width, height]"
ROUNDING = 1.0
"""Pixels by which a box may miss its image by rounding, or by counting pixels from 1."""
MANY = 10
"""So many boxes show which form all of them have."""
SMALL = 8
"""An image of more pixels a side has boxes of more than one pixel."""


class Boxes:
    """The check of all boxes of a json, which are mended in place.

    Args:
        findings: gets the troubles.
    """

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self._beyond = self._tiny = self._boxes = 0

    def check(self, item: dict[str, Any], place: str, size: Size) -> bool:
        """Check the box of an annotation; return False if it only touches its image, and is to be left out."""
        box: Any = item.get("bbox")
        problem = form_of(box) if "bbox" in item else ("without 'bbox'", BOX)
        if problem:
            self.findings.refuse("bbox", place, *problem)
            return True
        if not {*map(type, box)} <= {int, float}:
            item["bbox"] = box = [number(value) for value in box]
            self.findings.mend("annotations with a bbox written as text")
        return self._check_place(item, place, size)

    def _check_place(self, item: dict[str, Any], place: str, size: Size) -> bool:
        (x, y, w, h), (width, height) = item["bbox"], size
        self._boxes += 1
        self._tiny += max(x + w, y + h) <= 1 and max(size) > SMALL and w > 0
        misses = max(x - width, y - height, -x - w, -y - h)
        if misses >= ROUNDING:
            self.findings.refuse(
                "bbox", place, f"with bbox {item['bbox']}, which lies outside its image",
                f"a box in {width} x {height} pixels",
            )  # fmt: skip
            return True
        if misses >= 0:
            self.findings.mend("annotations whose box only touches the edge of its image, left out")
            return False
        beyond = max(-x, -y, x + w - width, y + h - height)
        self._beyond += beyond > ROUNDING and w > x and h > y
        if 0 < beyond <= ROUNDING:
            left, top = max(x, 0), max(y, 0)
            item["bbox"] = [left, top, min(x + w, width) - left, min(y + h, height) - top]
            self.findings.mend("boxes that reach beyond the image by up to a pixel, cut off there")
        return True

    def check_form(self) -> None:
        """Refuse boxes that all have another form: two corners, or parts of the image's size."""
        if self._boxes >= MANY and self._beyond > self._boxes / 2:
            self.findings.refuse(
                "form of bbox", "", f"with {self._beyond} of {self._boxes} boxes that reach beyond their images", BOX,
                "they look like [x0, y0, x1, y1]: subtract the first corner from the second",
            )  # fmt: skip
        elif self._boxes >= MANY and self._tiny == self._boxes:
            self.findings.refuse(
                "form of bbox", "", f"with {self._boxes} boxes that all lie in the first pixel of their images",
                f"{BOX} in pixels", "they look like parts of the image's size: multiply by width and height",
            )  # fmt: skip


def form_of(box: Any) -> tuple[str, str] | None:
    """Return what is wrong with a box, and what is allowed; None for four numbers."""
    if not isinstance(box, list):
        return f"with bbox {shown(box)}", "a list"
    if len(box) != 4:
        return f"with a bbox of {len(box)} numbers", BOX
    values = [number(value) for value in box]
    if None in values:
        return f"with bbox {shown(box)}", f"four finite numbers, {BOX}"
    if min(values[2:]) < 0:  # type: ignore[type-var, operator]
        return f"with bbox {box}, which has a negative size", BOX
    return None
