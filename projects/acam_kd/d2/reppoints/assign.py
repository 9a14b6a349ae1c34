"""The assignment of objects to cells: by the cell's position in the first stage, by the first box in the second."""

from __future__ import annotations

import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor

from .points import Grid

__all__ = ["BACKGROUND", "IGNORED", "assign_by_overlap", "assign_by_position"]

BACKGROUND, IGNORED = -1, -2


@torch.no_grad()
def assign_by_position(grid: Grid, boxes: Tensor, *, scale: float = 4, per_object: int = 1) -> Tensor:
    """Assign objects to the cells of their level that are nearest to their centres.

    The level follows from the geometric mean of an object's sides: at ``scale`` times a stride it is the level of that
    stride, at twice as much the next one. Distances are in units of the object's sides. A cell that several objects
    want belongs to the nearest, of equally near ones to the first; an object may thus get none.

    Args:
        grid: R cells; strides are powers of two.
        boxes: (G, 4), in pixels.
        scale: strides of an object of a level's size.
        per_object: cells that each object wants, at most as many as its level has.

    Returns:
        (R,), int64: the index of the object, or ``BACKGROUND``.
    """
    assigned = torch.full_like(grid.strides, BACKGROUND, dtype=torch.int64)
    if not len(boxes) or not len(assigned):
        return assigned
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp_min(1e-6).float()
    levels = grid.strides.log2().round()
    wanted = ((sides / scale).log2().sum(1) / 2).trunc().clamp(levels.min(), levels.max())
    centres = (boxes[:, 2:] + boxes[:, :2]) / 2
    distances = ((grid.points[None] - centres[:, None]) / sides[:, None]).norm(dim=2)  # (G, R)
    distances = distances.masked_fill(levels != wanted[:, None], torch.inf)
    nearest, cells = distances.topk(min(per_object, len(assigned)), dim=1, largest=False)
    objects = torch.arange(len(boxes), device=boxes.device)[:, None].expand_as(cells)
    known = nearest.isfinite()
    nearest, cells, objects = nearest[known], cells[known], objects[known]
    best = torch.full_like(grid.strides, torch.inf).scatter_reduce(0, cells, nearest, "amin")
    wins = nearest == best[cells]
    first = torch.full_like(assigned, len(boxes)).scatter_reduce(0, cells[wins], objects[wins], "amin")
    return torch.where(first < len(boxes), first, assigned)


@torch.no_grad()
def assign_by_overlap(
    candidates: Tensor,
    boxes: Tensor,
    *,
    low: float = 0.4,
    high: float = 0.5,
    without_overlap: bool = False,
) -> tuple[Tensor, Tensor]:
    """Assign objects to candidate boxes by their IoU.

    A candidate belongs to the object that it overlaps most if their IoU is ``high`` or more. It is background below
    ``low`` and ignored in between. Then every object takes all candidates that reach its own largest IoU, a later
    object before an earlier one.

    Args:
        candidates: (R, 4).
        boxes: (G, 4), of the objects.
        low, high: the two thresholds.
        without_overlap: let an object whose largest IoU is 0 take all candidates too, as the published code does: they
            all reach it.

    Returns:
        (R,), int64: the index of the object, ``BACKGROUND`` or ``IGNORED``; and, 0-d, the number of objects whose
        largest IoU is 0.
    """
    if not len(boxes) or not len(candidates):
        background = torch.full((len(candidates),), BACKGROUND, dtype=torch.int64, device=candidates.device)
        return background, background.new_tensor(len(boxes))
    overlaps = pairwise_iou(Boxes(boxes.float()), Boxes(candidates.float()))  # (G, R)
    largest, assigned = overlaps.max(0)
    assigned = assigned.masked_fill(largest < high, IGNORED).masked_fill(largest < low, BACKGROUND)
    reached = overlaps.amax(1, keepdim=True)
    taken = overlaps == reached
    if not without_overlap:
        taken &= reached > 0
    index = torch.arange(len(boxes), device=boxes.device)[:, None]
    last = torch.where(taken, index, BACKGROUND).amax(0)
    return torch.where(last >= 0, last, assigned), (reached == 0).sum()
