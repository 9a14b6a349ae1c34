"""Sets of points: the boxes that they stand for, and the cells that they belong to.

A set has P points. Channels are y and x of each point in turn, in cells of their level, counted from the cell's
top-left corner. Boxes are x0, y0, x1, y1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TRANSFORMS", "Grid", "grid_of", "minmax_box", "moment_box", "partial_minmax_box"]

TRANSFORMS = ("moment", "minmax", "partial_minmax")


def moment_box(points: Tensor, scale: Tensor) -> Tensor:
    """Compute the box around the mean of a set of points, with sides that follow its standard deviation.

    .. math:: x_{0,1} = \\mu_x \\mp \\sigma_x e^{m_0}, \\quad y_{0,1} = \\mu_y \\mp \\sigma_y e^{m_1}

    The deviation is the unbiased one. Where all points are equal, the box is empty and no gradient reaches its size.

    Args:
        points: (N, 2 P, H, W).
        scale: (2,), m: the logarithms of the scale of width and of height.

    Returns:
        (N, 4, H, W).
    """
    half, mean = [], []
    for axis, logarithm in zip((points[:, 1::2], points[:, 0::2]), scale):
        mean.append(axis.mean(1))
        half.append(axis.std(1) * logarithm.exp())
    centre, reach = torch.stack(mean, 1), torch.stack(half, 1)
    return torch.cat([centre - reach, centre + reach], 1)


def minmax_box(points: Tensor) -> Tensor:
    """Compute the smallest box around a set of points, (N, 2 P, H, W) -> (N, 4, H, W)."""
    y, x = points[:, 0::2], points[:, 1::2]
    return torch.stack([x.amin(1), y.amin(1), x.amax(1), y.amax(1)], 1)


def partial_minmax_box(points: Tensor) -> Tensor:
    """Compute the smallest box around the first four points, (N, 2 P, H, W) -> (N, 4, H, W)."""
    return minmax_box(points[:, :8])


@dataclass(frozen=True)
class Grid:
    """All cells of all levels, level after level and row by row.

    Args:
        points: (R, 2), x and y of the cells' top-left corners, in pixels.
        strides: (R,), of the level of each.
    """

    points: Tensor
    strides: Tensor

    def boxes(self, relative: Sequence[Tensor]) -> Tensor:
        """Return boxes in pixels, (N, R, 4), for boxes in cells, (N, 4, H, W) of each level."""
        flat = torch.cat([x.flatten(2) for x in relative], 2).transpose(1, 2)
        return flat * self.strides[:, None] + self.points.repeat(1, 2)


def grid_of(maps: Sequence[Tensor], strides: Sequence[int]) -> Grid:
    """Return the cells of maps (N, C, H, W), one of each level.

    Example:
        >>> grid_of([torch.zeros(1, 1, 1, 2)], [8]).points.tolist()
        [[0.0, 0.0], [8.0, 0.0]]
    """
    points, steps = [], []
    for x, stride in zip(maps, strides):
        rows, columns = (torch.arange(n, device=x.device, dtype=torch.float32) * stride for n in x.shape[2:])
        cell_y, cell_x = torch.meshgrid(rows, columns, indexing="ij")
        points.append(torch.stack([cell_x.flatten(), cell_y.flatten()], 1))
        steps.append(torch.full_like(points[-1][:, 0], stride))
    return Grid(torch.cat(points), torch.cat(steps))
