"""Deformable convolution by torchvision's operator; Detectron2's own has no backward on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

__all__ = ["DeformConv", "deformable_conv"]

Pair = tuple[int, int]


def deformable_conv(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 1,
    dilation: int | Pair = 1,
) -> Tensor:
    """Compute a deformable convolution in float32 at least, outside of autocast.

    The operator has no bfloat16 on CPUs, and offsets in half precision would move by parts of a cell.

    Args:
        x: (N, C, H, W).
        offset: (N, 2 * taps, H', W'): of each tap of the kernel, row by row, its offset in y and in x, in cells.
        weight: (C', C / groups, k, k).
        mask: (N, taps, H', W'), the factors of DCNv2; none for DCNv1.
        stride, padding, dilation: as of a convolution.

    Returns:
        (N, C', H', W').

    Example:
        >>> x, weight = torch.rand(1, 4, 5, 5), torch.rand(2, 4, 3, 3)
        >>> plain = deformable_conv(x, torch.zeros(1, 18, 5, 5), weight)
        >>> torch.allclose(plain, torch.nn.functional.conv2d(x, weight, padding=1), atol=1e-5)
        True
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return deform_conv2d(  # type: ignore[no-any-return]
            x.to(dtype), offset.to(dtype), weight.to(dtype), None, stride, padding, dilation,
            None if mask is None else mask.to(dtype),
        )  # fmt: skip


class DeformConv(nn.Module):
    """A deformable convolution without bias, whose offsets come from outside.

    Names and shapes of its parameters are those of Detectron2's ``DeformConv``, so checkpoints of either fit.

    Args:
        in_channels, out_channels: C and C'.
        kernel_size: of the square kernel.
        stride, padding, dilation, groups: as of a convolution.
        norm: applied to the output, if there is one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int | Pair = 1,
        padding: int | Pair = 1,
        dilation: int | Pair = 1,
        groups: int = 1,
        norm: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, kernel_size, kernel_size))
        self.norm = norm
        nn.init.normal_(self.weight, std=0.01)

    @classmethod
    def like(cls, other: Any) -> DeformConv:
        """Return the same convolution as one of Detectron2's, with its very weight and normalisation."""
        conv = cls(
            other.in_channels,
            other.out_channels,
            kernel_size=other.kernel_size[0],
            stride=other.stride,
            padding=other.padding,
            dilation=other.dilation,
            groups=other.groups,
            norm=other.norm,
        )
        conv.weight = other.weight
        return conv

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (N, C', H', W'); see ``deformable_conv``."""
        x = deformable_conv(
            x, offset, self.weight, mask, stride=self.stride, padding=self.padding, dilation=self.dilation
        )
        return x if self.norm is None else self.norm(x)
