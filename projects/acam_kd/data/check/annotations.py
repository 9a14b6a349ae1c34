"""The annotations of a COCO json, one by one: references, boxes, crowds, segmentations, areas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .findings import Findings, shown
from .segmentation import Wrong, check_segmentation, mask_area, mask_box
from .values import LARGEST, identity, number, whole

__all__ = ["Annotations", "Needs"]

Size = tuple[int, int]
BOX = "[x, y, width, height]"
ROUNDING = 1.0
"""Pixels by which a box may miss its image by rounding, or by counting pixels from 1."""
MANY = 10
"""So many boxes show which form all of them have."""
SMALL = 8
"""An image of more pixels a side has boxes of more than one pixel."""


@dataclass(frozen=True)
class Needs:
    """The parts of a dataset that a run reads.

    Args:
        masks: True if every annotation has to have a segmentation, False if none is read, None if they are checked
            where they are.
        areas: areas are read, as COCO's evaluation and torchvision's segmentation do.
        ids: annotations need different ids from 1, as in COCO's evaluation, where 0 is "no match".
    """

    masks: bool | None = None
    areas: bool = True
    ids: bool = True


class Annotations:
    """The check of a json's annotations, which are mended in place.

    Args:
        sizes: image id -> its width and height; an image whose own size is in doubt has None.
        categories: the ids of the categories.
        needs: see ``Needs``.
        findings: gets the troubles.
    """

    def __init__(
        self, sizes: dict[int | str, Size | None], categories: set[int], needs: Needs, findings: Findings
    ) -> None:
        self.sizes, self.categories, self.needs, self.findings = sizes, categories, needs, findings
        self._beyond = self._tiny = self._boxes = 0

    def check(self, annotations: list[Any]) -> list[dict[str, Any]]:
        """Check all; return those that are kept."""
        kept = [item for number, item in enumerate(annotations) if self._check(number, item)]
        if not self.findings.counts and all(item["iscrowd"] for item in kept):
            found = "with crowds only" if kept else "with no box inside of an image"
            self.findings.refuse("crowds", "", found, "at least one box that is not a crowd")
        self._check_form()
        self._check_ids(kept)
        return kept

    def _check(self, index: int, item: Any) -> bool:
        """Check and mend one annotation; return False for one that is left out."""
        if not isinstance(item, dict):
            self.findings.refuse("annotations", f"annotations[{index}]", f"that is {shown(item)}", "an object of json")
            return True
        place = f"annotations[{index}]" + (f" (id {shown(item['id'])})" if "id" in item else "")
        self._check_crowd(item, place)
        known = self._check_reference(item, "image_id", self.sizes, place)
        self._check_reference(item, "category_id", self.categories, place)
        if item.get("ignore") and number(item["ignore"]) != 0:
            self.findings.refuse(
                "ignore", place, f"with ignore {shown(item['ignore'])}", "0 or none, since Detectron2 stops at others",
                "take the annotation out, or make it a crowd",
            )  # fmt: skip
        size = self.sizes.get(item["image_id"]) if known else None
        if size is None:
            return True
        masked = self._check_segmentation(item, place, size)
        inside = self._check_box(item, place, size, masked)
        if inside:
            self._check_area(item, place, size, masked)
        return inside

    def _check_reference(self, item: dict[str, Any], key: str, known: Any, place: str) -> bool:
        if key not in item:
            self.findings.refuse(key, place, f"without {key!r}", f"the {key.replace('_', ' ')} of the annotation")
            return False
        value = item[key]
        if type(value) is int and value in known:
            return True
        found = identity(value)
        if found is not None and found not in known and str(found) in known:
            found = str(found)  # ids of images may be texts
        if found is None or found not in known:
            what = "an image" if key == "image_id" else "a category"
            self.findings.refuse(key, place, f"with {key} {shown(value)}", f"the id of {what}")
            return False
        if type(found) is not type(value) or found != value:
            item[key] = found
            self.findings.mend(f"annotations with {key} written as text or with a point")
        return True

    def _check_crowd(self, item: dict[str, Any], place: str) -> None:
        value = item.get("iscrowd")
        if value is None:
            item["iscrowd"] = 0
            self.findings.mend("annotations without iscrowd, taken as 0")
        elif type(value) is not int or value not in (0, 1):
            found = int(value) if isinstance(value, bool) else whole(value)
            item["iscrowd"] = found if found in (0, 1) else 0
            if found in (0, 1):
                self.findings.mend("annotations with iscrowd written otherwise than 0 or 1")
            else:
                self.findings.refuse("iscrowd", place, f"with iscrowd {shown(value)}", "0 or 1")

    # Masks.

    def _check_segmentation(self, item: dict[str, Any], place: str, size: Size) -> bool:
        """Return True if the annotation has a mask that can be used."""
        value = item.get("segmentation")
        if not value or value == [[]]:
            if self.needs.masks:
                self.findings.refuse(
                    "segmentation", place, "without 'segmentation'", "the outline or mask that a model of masks needs"
                )
            elif value:
                item["segmentation"] = []
            return False
        try:
            mended, what = check_segmentation(value, size)
        except Wrong as error:
            if self.needs.masks is not False:
                found = f"with segmentation {shown(value)}, {error.found}"
                self.findings.refuse("segmentation", place, found, error.allowed)
            else:
                del item["segmentation"]  # Detectron2 would leave the box out too
                self.findings.mend("segmentations that cannot be used, left out because no masks are read")
            return False
        if what:
            item["segmentation"] = mended
            self.findings.mend(what)
        return True

    # Boxes.

    def _check_box(self, item: dict[str, Any], place: str, size: Size, masked: bool) -> bool:
        """Return False for an annotation that is left out, since its box only touches the image."""
        if item.get("bbox") is None and masked:
            item["bbox"] = mask_box(item["segmentation"], size)
            self.findings.mend("annotations without bbox, which is made from the segmentation")
        box = item.get("bbox")
        problem = self._form_of(box) if "bbox" in item else ("without 'bbox'", BOX)
        if problem:
            self.findings.refuse("bbox", place, *problem)
            return True
        if not {*map(type, box)} <= {int, float}:
            item["bbox"] = box = [number(value) for value in box]
            self.findings.mend("annotations with a bbox written as text")
        return self._check_place(item, place, size)

    def _form_of(self, box: Any) -> tuple[str, str] | None:
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

    def _check_form(self) -> None:
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

    # Areas and ids.

    def _check_area(self, item: dict[str, Any], place: str, size: Size, masked: bool) -> None:
        if not self.needs.areas:
            return
        value, box = item.get("area"), item["bbox"] if self._form_of(item.get("bbox")) is None else None
        if type(value) is float and value != value:
            value = None
        if value is None:
            if masked or box:
                item["area"] = mask_area(item["segmentation"], size) if masked else box[2] * box[3]
                self.findings.mend("annotations without area, which is made from the mask, else from the box")
            return
        found, largest = number(value), max(size[0] * size[1], box[2] * box[3] if box else 0)
        if found is None or found < 0:
            self.findings.refuse("area", place, f"with area {shown(value)}", "a number, not negative")
        elif found > 1.01 * largest + 1:
            self.findings.refuse(
                "area", place, f"with area {shown(value)}", f"at most {largest:g}, the pixels of its image",
                "take the areas out, and they are made from masks or boxes",
            )  # fmt: skip
        elif type(value) is str:
            item["area"] = found
            self.findings.mend("annotations with an area written as text")

    def _check_ids(self, annotations: list[Any]) -> None:
        """Number all annotations anew where an id is missing, doubled or not what COCO's evaluation takes."""
        found = [item.get("id") if isinstance(item, dict) else None for item in annotations]
        good = {*map(type, found)} <= {int} and len({*found}) == len(found)
        if good and (not found or max(found) <= LARGEST and (not self.needs.ids or min(found) > 0)):
            return
        for index, item in enumerate(annotations, 1):
            if isinstance(item, dict):
                item["id"] = index
        self.findings.mend("annotations numbered anew from 1, since ids were missing, double, below 1 or no numbers",
                           len(annotations))  # fmt: skip
