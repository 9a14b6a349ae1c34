"""The picture of confusions."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from acam_kd.report.confusion import draw_confusion, draw_confusions


def picture(counts):
    with Image.open(io.BytesIO(draw_confusion(counts, [f"class {k}" for k in range(len(counts))]))) as found:
        return np.asarray(found.convert("RGB")).astype(int)


def test_the_right_classes_are_dark_and_empty_rows_are_no_fault():
    """Of two classes, one is always right, and there is no image of the other."""
    found = picture(np.array([[5, 0], [0, 0]]))
    blue = (found[..., 2] - found[..., 0] > 60).mean((0, 1))
    assert 0.02 < blue < 0.25
    assert (picture(np.array([[0, 0], [0, 0]]))[..., 2] - picture(np.array([[0, 0], [0, 0]]))[..., 0]).max() < 60


@pytest.mark.parametrize("classes", [2, 12, 31, 200])
def test_many_classes_have_no_names(classes):
    assert min(picture(np.eye(classes, dtype=int)).shape[:2]) > 200


def test_several_stand_beside_each_other():
    names, counts = ["a", "b"], np.eye(2, dtype=int)
    sizes = []
    for number in (1, 3, 4):
        with Image.open(io.BytesIO(draw_confusions({f"row {k}": counts for k in range(number)}, names))) as found:
            sizes.append(found.size)
    one, three, four = sizes
    assert three == pytest.approx((3 * one[0], one[1]), abs=2) and four == pytest.approx(
        (3 * one[0], 2 * one[1]), abs=2
    )
