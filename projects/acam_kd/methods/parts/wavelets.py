"""The two-dimensional Haar transform and its inverse, by additions over 2 x 2 blocks.

Letters: N images, C channels, H x W positions of one level. The block [[a, b], [c, d]] becomes

    low = (a + b + c + d) / 2
    high = (a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2

The transform is orthonormal: the energy of the four results is that of the block. An odd side gets a zero at its end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

__all__ = ["haar", "haar_levels", "inverse_haar", "inverse_haar_levels"]


def haar(x: Tensor) -> tuple[Tensor, Tensor]:
    """Transform (N, C, H, W) to low (N, C, H/2, W/2) and high (N, C, 3, H/2, W/2), sides rounded up."""
    n, c, h, w = x.shape
    x = F.pad(x, (0, w % 2, 0, h % 2))
    a, b, c_, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    high = torch.stack([a + b - c_ - d, a - b + c_ - d, a - b - c_ + d], dim=2)
    return (a + b + c_ + d) / 2, high / 2


def inverse_haar(low: Tensor, high: Tensor, size: Sequence[int]) -> Tensor:
    """Return the map that ``haar`` transformed, cropped to ``size``, its height and width."""
    p, q, r = high.unbind(2)
    rows = [
        torch.stack([low + p + q + r, low + p - q - r], dim=-1),
        torch.stack([low - p + q - r, low - p - q + r], dim=-1),
    ]
    x = torch.stack([row.flatten(-2) for row in rows], dim=-2).flatten(-3, -2) / 2
    return x[..., : size[0], : size[1]]


def haar_levels(x: Tensor, levels: int) -> tuple[Tensor, list[Tensor]]:
    """Apply ``haar`` repeatedly to the low part: the last low part, and the high part of every level, finest first."""
    highs = []
    for _ in range(levels):
        x, high = haar(x)
        highs.append(high)
    return x, highs


def inverse_haar_levels(low: Tensor, highs: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Return the map that ``haar_levels`` transformed, of height and width ``size``."""
    sizes = [size, *(high.shape[-2:] for high in highs[:-1])]
    for high, finer in zip(reversed(highs), reversed(sizes)):
        low = inverse_haar(low, high, finer)
    return low
