"""Which cells an object gets: the cases of the published code, ties, and the object that touches nothing."""

from __future__ import annotations

import pytest
import torch

from acam_kd.d2.reppoints.assign import BACKGROUND, IGNORED, assign_by_overlap, assign_by_position
from acam_kd.d2.reppoints.points import grid_of

SIDES = ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))
GRID = grid_of([torch.zeros(1, 1, *side) for side in SIDES], [8, 16, 32, 64, 128])
BOXES = torch.tensor(
    [[10.0, 6, 50, 40], [12, 8, 48, 44], [0, 0, 95, 63], [70, 30, 78, 37], [20, 50, 90, 62], [40, 40, 41, 41]]
)
CANDIDATES = torch.tensor(
    [[0.0, 0, 10, 10], [0, 0, 10, 9], [2, 2, 12, 12], [50, 50, 60, 60], [0, 0, 10, 4.5], [100, 100, 101, 101]]
)
OBJECTS = torch.tensor([[0.0, 0, 10, 10], [48, 48, 58, 58]])


def found(assigned):
    """Cell -> the object, counted from 1."""
    return {int(cell): int(assigned[cell]) + 1 for cell in (assigned >= 0).nonzero()[:, 0]}


def test_the_grid_is_the_published_one():
    assert len(GRID.points) == 129 and GRID.points[96].tolist() == [0, 0] and GRID.strides[96] == 16


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (1, {40: 1, 57: 4, 65: 6, 91: 5, 111: 3}),  # the second object gets none
        (
            3,
            {
                **dict.fromkeys((28, 39, 40), 1), 52: 2, **dict.fromkeys((57, 58, 69), 4),
                **dict.fromkeys((65, 66, 77), 6), **dict.fromkeys((90, 91, 92), 5),
                **dict.fromkeys((110, 111, 112), 3),
            },
        ),
    ],
)  # fmt: skip
def test_objects_take_the_cells_nearest_to_their_centres(number, expected):
    assert found(assign_by_position(GRID, BOXES, per_object=number)) == expected


@pytest.mark.parametrize(
    ("side", "stride"), [(0.0, 8), (1.0, 8), (63.9, 8), (64.1, 16), (128.1, 32), (256.1, 64), (512.1, 128), (9e3, 128)]
)
def test_the_level_follows_from_the_size(side, stride):
    box = torch.tensor([[50.0, 50, 50 + side, 50 + side]])
    (cell,) = found(assign_by_position(GRID, box))
    assert GRID.strides[cell] == stride


def test_of_two_equal_objects_the_first_gets_the_cell():
    twice = torch.tensor([[10.0, 6, 50, 40]]).expand(2, 4)
    assert found(assign_by_position(GRID, twice)) == {40: 1}


def test_a_small_level_gives_what_it_has():
    box = torch.tensor([[0.0, 0, 600, 600]])
    assert found(assign_by_position(GRID, box, per_object=9)) == {128: 1}


def test_candidates_are_assigned_by_their_overlap():
    assigned, missed = assign_by_overlap(CANDIDATES, OBJECTS)
    assert (assigned + 1).tolist() == [1, 1, IGNORED + 1, 2, IGNORED + 1, 0] and missed == 0


def test_an_object_that_touches_nothing_is_left_out_and_counted():
    more = torch.cat([OBJECTS, torch.tensor([[200.0, 200, 210, 210]])])
    assigned, missed = assign_by_overlap(CANDIDATES, more)
    assert torch.equal(assigned, assign_by_overlap(CANDIDATES, OBJECTS)[0]) and missed == 1
    published, missed = assign_by_overlap(CANDIDATES, more, without_overlap=True)
    assert (published + 1).tolist() == [3] * 6 and missed == 1


def test_a_later_object_takes_what_both_reach():
    assigned, _ = assign_by_overlap(CANDIDATES[:1], OBJECTS[:1].expand(2, 4))
    assert assigned.tolist() == [1]


@pytest.mark.parametrize("number", [0, 3])
def test_nothing_is_background(number):
    assigned, missed = assign_by_overlap(CANDIDATES, OBJECTS[:0])
    assert assigned.tolist() == [BACKGROUND] * 6 and missed == 0
    assert assign_by_overlap(CANDIDATES[:0], OBJECTS)[0].numel() == 0
    assert set(assign_by_position(GRID, BOXES[:0]).tolist()) == {BACKGROUND}
