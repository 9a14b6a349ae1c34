"""Outlines and run lengths of annotations, checked before pycocotools' C code sees them, which checks nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from .findings import shown
from .values import number, whole

__all__ = ["Wrong", "check_segmentation", "mask_area", "mask_box"]

Size = tuple[int, int]
"""Width and height of an image."""
NUMBERS = ({int}, {float}, {int, float})
LONGEST = 10_000_000
"""Pixels on the outline of one annotation: pycocotools takes about 100 bytes for each."""
FORM = "[[x0, y0, x1, y1, x2, y2, ...], ...], a list of numbers for each polygon"


class Wrong(ValueError):
    """A segmentation that cannot be used: what was found, and what is allowed."""

    def __init__(self, found: str, allowed: str) -> None:
        super().__init__(found, allowed)
        self.found, self.allowed = found, allowed


def check_segmentation(value: Any, size: Size) -> tuple[Any, str]:
    """Check polygons or run lengths of one annotation.

    Args:
        value: from the json, neither missing nor empty.
        size: of the image.

    Returns:
        What pycocotools can read, and what was mended, in words: empty if nothing was.

    Raises:
        Wrong: it cannot be used.
    """
    if isinstance(value, dict):
        return _check_runs(value, size)
    if not isinstance(value, list):
        raise Wrong("that is neither polygons nor run lengths", FORM)
    return _check_polygons(value, size)


def mask_area(value: Any, size: Size) -> float:
    """Return the number of pixels of a checked segmentation."""
    return float(coco_mask.area(_encoded(value, size)))


def mask_box(value: Any, size: Size) -> list[float]:
    """Return x, y, width and height of a checked segmentation."""
    return [float(x) for x in coco_mask.toBbox(_encoded(value, size))]


def _encoded(value: Any, size: Size) -> Any:
    width, height = size
    if isinstance(value, list):
        return coco_mask.merge(coco_mask.frPyObjects(value, height, width))
    return coco_mask.frPyObjects(value, height, width) if isinstance(value["counts"], list) else value


# Polygons.


def _check_polygons(polygons: list[Any], size: Size) -> tuple[Any, str]:
    mended = ""
    if not any(isinstance(piece, (list, dict)) for piece in polygons) and len(polygons) >= 6:
        polygons, mended = [polygons], "polygons that were not in a list"
    kept = []
    bound = 0.0
    for piece in polygons:
        if not isinstance(piece, list):
            raise Wrong("that is no list of polygons", FORM)
        if set(map(type, piece)) not in NUMBERS and piece:
            piece, mended = _numbers(piece), "segmentations with numbers written as text"
        if len(piece) % 2:
            raise Wrong(f"with a polygon of {len(piece)} numbers", "an even number, x and y of each point")
        if len(piece) < 6:
            continue
        bound += _check_piece(piece, size)
        kept.append(piece)
    if not kept:
        raise Wrong("without a polygon of three points", "at least three points, six numbers, for each polygon")
    if bound > _longest(size) and (outline := sum(map(_outline, kept))) > _longest(size):
        raise Wrong(
            f"with an outline of {outline:.3g} pixels", f"at most {_longest(size):.3g} in an image of this size"
        )
    if len(kept) < len(polygons):
        mended = "polygons of fewer than three points, left out beside others"
    return kept if mended else polygons, mended


def _numbers(piece: list[Any]) -> list[float]:
    found = [number(value) for value in piece]
    if any(value is None for value in found):
        raise Wrong("with a polygon of other things than numbers", FORM)
    return [value for value in found if value is not None]


def _check_piece(piece: list[float], size: Size) -> float:
    """Check that a polygon lies near its image; return a bound of its outline's length, in pixels."""
    (width, height), xs, ys = size, piece[0::2], piece[1::2]
    if not _is_finite(piece):
        raise Wrong("with a number that is not finite", "finite numbers")
    left, top, right, bottom = min(xs), min(ys), max(xs), max(ys)
    allowed = f"points in {width} x {height} pixels"
    if left < -width or top < -height or right > 2 * width or bottom > 2 * height:
        raise Wrong(
            f"with x from {left:g} to {right:g}, y from {top:g} to {bottom:g}, far outside of its image", allowed
        )
    if right < -1 or bottom < -1 or left > width + 1 or top > height + 1:
        raise Wrong("with a polygon outside of its image", allowed)
    return len(xs) * max(right - left, bottom - top)


def _is_finite(piece: list[float]) -> bool:
    try:
        return math.isfinite(sum(piece))  # unlike min and max, a sum does not miss a NaN
    except OverflowError:  # whole numbers beyond all floats
        return False


def _outline(piece: list[float]) -> float:
    steps = np.abs(np.diff(np.asarray(piece, dtype=np.float64).reshape(-1, 2), axis=0))
    return float(steps.max(1).sum())


def _longest(size: Size) -> float:
    width, height = size
    return min(4.0 * width * height + 100 * (width + height), LONGEST)


# Run lengths.


def _check_runs(value: dict[str, Any], size: Size) -> tuple[Any, str]:
    width, height = size
    counts, found = value.get("counts"), value.get("size")
    sides = [whole(side) for side in found] if isinstance(found, list) else []
    if sides != [height, width]:
        raise Wrong(f"with a size of {shown(found)}", f"[{height}, {width}], height and width of its image")
    mended = "" if found == sides and set(map(type, sides)) == {int} else "run lengths with a size written as text"
    if isinstance(counts, str):
        runs = _decoded(counts)
    elif isinstance(counts, list):
        listed = [whole(count) for count in counts]
        if any(count is None for count in listed):
            raise Wrong("with counts of other things than whole numbers", "whole numbers, not negative")
        if not {*map(type, counts)} <= {int}:
            counts, mended = listed, "run lengths written as text or with a point"
        runs = np.array(listed, dtype=np.float64)
    else:
        raise Wrong("without counts", "the lengths of runs as a list, or a text in COCO's compressed form")
    if len(runs) and runs.min() < 0:
        raise Wrong("with a negative run", "lengths of runs")
    if runs.sum() != width * height:
        raise Wrong(f"with runs of {runs.sum():.0f} pixels", f"{width * height}, the pixels of {width} x {height}")
    return ({**value, "size": sides, "counts": counts} if mended else value), mended


def _decoded(text: str) -> np.ndarray[Any, Any]:
    """Decode COCO's compressed run lengths: groups of 5 bits, from the low ones, each but the last with a sixth bit.

    From the third on, a run is stored as its difference to the run before the last.
    """
    wrong = Wrong("with counts that are no run lengths", "a text in COCO's compressed form")
    try:
        codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        raise wrong from None
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise wrong
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # 35 bits are more than any image has
        raise wrong
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    values = np.add.reduceat((codes & 31) << shifts, starts)
    values = np.where(codes[ends] & 16 != 0, values - (1 << (5 * lengths)), values)
    for each_second in (slice(1, None, 2), slice(2, None, 2)):  # the first run stands alone
        values[each_second] = np.cumsum(values[each_second])
    return values.astype(np.float64)
