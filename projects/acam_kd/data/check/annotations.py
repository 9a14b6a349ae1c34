"""The annotations of a COCO json, one by one: references, boxes, crowds, segmentations, areas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .boxes import Boxes, form_of
from .findings import Findings, shown
from .segmentation import Wrong, check_segmentation, mask_area, mask_box
from .values import LARGEST, identity, number, whole

__all__ = ["Annotations", "Needs"]

Size = tuple[int, int]


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
        self.boxes = Boxes(findings)

    def check(self, annotations: list[Any]) -> list[dict[str, Any]]:
        """Check all; return those that are kept."""
        kept = [item for number, item in enumerate(annotations) if self._check(number, item)]
        if not self.findings.counts and all(item["iscrowd"] for item in kept):
            found = "with crowds only" if kept else "with no box inside of an image"
            self.findings.refuse("crowds", "", found, "at least one box that is not a crowd")
        self.boxes.check_form()
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
        if type(value) in (int, str) and value in known:
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

    def _check_box(self, item: dict[str, Any], place: str, size: Size, masked: bool) -> bool:
        """Return False for an annotation that is left out, since its box only touches the image."""
        if item.get("bbox") is None and masked:
            item["bbox"] = mask_box(item["segmentation"], size)
            self.findings.mend("annotations without bbox, which is made from the segmentation")
        return self.boxes.check(item, place, size)

    # Areas and ids.

    def _check_area(self, item: dict[str, Any], place: str, size: Size, masked: bool) -> None:
        if not self.needs.areas:
            return
        value: Any = item.get("area")
        box: Any = item.get("bbox") if form_of(item.get("bbox")) is None else None
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
        """Give all annotations new ids where one is missing, double, or not what COCO's evaluation takes."""
        found: list[Any] = [item.get("id") if isinstance(item, dict) else None for item in annotations]
        good = {*map(type, found)} <= {int} and len({*found}) == len(found)
        if good and (not found or max(found) <= LARGEST and (not self.needs.ids or min(found) > 0)):
            return
        for index, item in enumerate(annotations, 1):
            if isinstance(item, dict):
                item["id"] = index
        self.findings.mend("annotations numbered anew from 1, since ids were missing, double, below 1 or no numbers",
                           len(annotations))  # fmt: skip
