"""Panels: colours, shapes and positions by hand."""

from __future__ import annotations

import numpy as np
import pytest

from acam_kd.report.panels import (
    GAP,
    LINE,
    MARGIN,
    STRIP_HEIGHT,
    STRIP_WIDTH,
    TILE,
    channel_panel,
    draw_detections,
    heat,
    mask_panel,
)

BLACK = np.zeros((50, 100, 3), np.uint8)
ZERO, ONE = (68, 1, 84), (253, 231, 37)  # the ends of viridis
RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 255, 0)
TOP = MARGIN + LINE + GAP + LINE + GAP
"""The upper edge of the first row's pictures."""


def over_black(colour):
    return [round(0.6 * c) for c in colour]


def test_heat_is_viridis_on_a_fixed_scale():
    assert heat(np.array([0.0, 1.0, -3.0, 7.0])).tolist() == [[*ZERO], [*ONE], [*ZERO], [*ONE]]
    assert heat(np.array([[0.5]])).tolist() == [[[33, 145, 140]]]
    assert (heat(np.array([0.499])) == heat(np.array([0.4991]))).all()


def test_a_mask_lies_where_it_belongs():
    """Image 50 x 100 at stride 25: 2 x 4 positions; a tile is 75 x 150, so a position is 37.5 pixels of it."""
    mask = np.zeros((2, 2, 4))
    mask[1, 1, 2] = 1
    panel = mask_panel(BLACK, {"p3": mask}, {"p3": 25})
    assert panel.dtype == np.uint8
    assert panel.shape == (TOP + TILE // 2 + LINE + GAP + MARGIN, 2 * MARGIN + 3 * TILE + 2 * GAP, 3)
    image, first, second = (MARGIN + i * (TILE + GAP) for i in range(3))
    assert not panel[TOP : TOP + 75, image : image + 150].any()
    assert (panel[TOP : TOP + 75, first : first + 150] == over_black(ZERO)).all()
    lit = (panel[TOP : TOP + 75, second : second + 150] == over_black(ONE)).all(2)
    assert lit[38:, 75:112].all() and not lit[:37].any() and not lit[:, :75].any() and not lit[:, 113:].any()


def test_the_image_shines_through_in_grey():
    white = np.full((50, 50, 3), 255, np.uint8)
    panel = mask_panel(white, {"p3": np.ones((1, 2, 2))}, {"p3": 25})
    assert panel[TOP + 5, MARGIN + TILE + GAP + 5].tolist() == [round(0.4 * 255 + 0.6 * c) for c in ONE]


def test_padding_is_neither_shown_nor_counted():
    """The batch is 64 x 128 at stride 8 and the image 50 x 100: 7 x 13 positions, the last ones in part."""
    mask = np.ones((1, 8, 16))
    mask[0, :7, :13] = 0
    padded = mask_panel(BLACK, {"p3": mask}, {"p3": 8})
    exact = mask_panel(BLACK, {"p3": mask[:, :7, :13]}, {"p3": 8})
    assert (padded == exact).all()
    assert not (padded[TOP : TOP + 75, MARGIN + TILE + GAP :] == over_black(ONE)).all(2).any()
    mask[0, 6, 12] = 1
    corner = mask_panel(BLACK, {"p3": mask}, {"p3": 8})[TOP : TOP + 75, MARGIN + TILE + GAP : -MARGIN]
    lit = (corner == over_black(ONE)).all(2)  # from pixel 48 and 96 on: of the tile's, from 72 and 144 on
    assert lit[72:, 144:].all() and lit.sum() == 3 * 6


def test_a_map_that_stops_short_of_the_image_goes_on():
    """A backbone that rounds down leaves the last pixels without a position of their own."""
    panel = mask_panel(BLACK, {"p3": np.ones((1, 1, 3))}, {"p3": 32})
    tile = panel[TOP : TOP + 75, MARGIN + TILE + GAP : -MARGIN]
    assert (tile == over_black(ONE)).all()


def test_rows_share_the_scale_and_differ_in_stride():
    rows = {"p3": np.full((1, 7, 13), 0.5), "p7, step 4": np.full((1, 1, 1), 0.5)}
    panel = mask_panel(BLACK, rows, {"p3": 8, "p7, step 4": 128})
    row = LINE + GAP + TILE // 2 + LINE + GAP
    first, second = (panel[TOP + k * row : TOP + k * row + 75, MARGIN + TILE + GAP : -MARGIN] for k in (0, 1))
    assert (first == second).all() and (first == over_black((33, 145, 140))).all()


def test_what_is_printed_changes_with_what_the_eye_cannot_see():
    a, b = (mask_panel(BLACK, {"p3": np.full((1, 2, 4), v)}, {"p3": 25}) for v in (0.500, 0.501))
    tile = slice(TOP, TOP + 75), slice(MARGIN + TILE + GAP, -MARGIN)
    assert (a[tile] == b[tile]).all() and (a != b).any()


@pytest.mark.parametrize("size", [(1, 400), (400, 1), (3, 3), (1200, 900)])
def test_odd_sizes(size):
    panel = mask_panel(np.zeros((*size, 3), np.uint8), {"p3": np.ones((2, 3, 3))}, {"p3": 7.5})
    assert panel.ndim == 3 and panel.shape[0] > 60


def test_channels_are_strips_in_order():
    masks = np.zeros((2, 3))
    masks[1, 2] = 1
    panel = channel_panel({"p3": masks})
    cell, left, top = STRIP_WIDTH // 3, MARGIN, MARGIN + LINE + 3 + LINE + 3
    second = top + STRIP_HEIGHT + 3
    assert (panel[top : top + STRIP_HEIGHT, left : left + 3 * cell] == ZERO).all()
    assert (panel[second : second + STRIP_HEIGHT, left : left + 2 * cell] == ZERO).all()
    assert (panel[second : second + STRIP_HEIGHT, left + 2 * cell : left + 3 * cell] == ONE).all()
    assert channel_panel({"p3": np.zeros((1, 2048))}).shape[1] > 2048


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        (BLACK.astype(float), np.ones((1, 2, 2))),
        (BLACK[..., 0], np.ones((1, 2, 2))),
        (BLACK[:0], np.ones((1, 2, 2))),
        (BLACK, np.ones((2, 2))),
        (BLACK, np.ones((1, 1, 2, 2))),
    ],
)
def test_wrong_shapes_are_named(image, mask):
    with pytest.raises(ValueError, match=r"uint8 RGB \(H, W, 3\)|masks of p3 must be \(M, h, w\)"):
        mask_panel(image, {"p3": mask}, {"p3": 8})
    with pytest.raises(ValueError, match=r"masks of p3 must be \(M, C\)"):
        channel_panel({"p3": np.ones((1, 2, 2))})


def test_boxes_are_drawn_on_a_copy():
    image = np.full((60, 80, 3), 9, np.uint8)
    boxes = np.array([[10.2, 20.4, 39.6, 49.7], [10, 20, 70, 50]])
    out = draw_detections(image, boxes, ["", ""], None, [RED, BLUE])
    assert (image == 9).all() and out.shape == image.shape
    assert out[20, 30].tolist() == [*RED]  # the first lies on top
    assert out[20, 60].tolist() == [*BLUE] and out[35, 70].tolist() == [*BLUE]
    assert out[35, 25].tolist() == [9, 9, 9] and out[10, 10].tolist() == [9, 9, 9]


def test_labels_stay_in_the_image():
    image = np.zeros((60, 80, 3), np.uint8)
    boxes = np.array([[70, 2, 79, 59], [0, 40, 20, 58]])
    out = draw_detections(image, boxes, ["cell", "cell"], np.array([0.5, 0.25]), [RED, BLUE])
    assert out.shape == image.shape
    assert (out[3:14, 40:60] == RED).all(2).any()  # shifted to the left
    assert (out[26:38, 1:5] == BLUE).all(2).any()  # above its box
    boxes = np.array([[10, 30, 50, 40], [12, 31, 50, 40], [11, 29, 50, 40]])
    crowded = draw_detections(np.zeros((80, 80, 3), np.uint8), boxes, ["a", "b", "c"], None, [RED, BLUE, GREEN])
    assert (crowded[16:28, 10:18] == RED).all(2).any() and (crowded[42:54, 12:20] == BLUE).all(2).any()
    assert not (crowded[:28] == GREEN).all(2).any() and not (crowded[43:] == GREEN).all(2).any()  # no place is free
    empty = draw_detections(image, np.zeros((0, 4)), [], np.zeros(0), [])
    assert (empty == image).all() and empty is not image
