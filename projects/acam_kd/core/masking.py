"""Adaptive spatial-channel masking (ASCM): learnable selection units turn the fused map into soft masks.

Letters: N images, C channels, H x W positions, M masks. Paper: ACAM-KD, arXiv 2503.06307. Starting the
units from N(0, 0.01^2) is a reading; it is how MasKD starts its tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .registry import MASKING_REGISTRY

__all__ = ["ChannelMasking", "SpatialMasking", "UniformMasking"]

INIT_STD = 0.01


def _check_num_masks(num_masks: int) -> None:
    if num_masks < 1:
        raise ValueError(f"num_masks must be at least 1, not {num_masks} (key: NUM_MASKS)")


def _units(num_masks: int, width: int) -> nn.Parameter:
    _check_num_masks(num_masks)
    return nn.Parameter(torch.randn(num_masks, width) * INIT_STD)


@MASKING_REGISTRY.register()
class SpatialMasking(nn.Module):
    """M_s = sigmoid(m_s z): M masks over positions.

    Args:
        channels: C of the fused map.
        num_masks: M; 6 for detection, the number of classes for segmentation.
    """

    kind = "spatial"

    def __init__(self, channels: int, *, num_masks: int) -> None:
        super().__init__()
        self.units = _units(num_masks, channels)

    def forward(self, fused: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, M, H, W)."""
        return torch.einsum("mc,nchw->nmhw", self.units, fused).sigmoid()


@MASKING_REGISTRY.register()
class ChannelMasking(nn.Module):
    """M_c = sigmoid(m_c v), v the mean of the fused map over positions: M masks over channels.

    The masks differ by one slope each.

    Args:
        num_masks: M.
    """

    kind = "channel"

    def __init__(self, *, num_masks: int) -> None:
        super().__init__()
        self.units = _units(num_masks, 1)

    def forward(self, fused: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, M, C)."""
        return (self.units * fused.mean((2, 3)).unsqueeze(1)).sigmoid()


@MASKING_REGISTRY.register()
class UniformMasking(nn.Module):
    """All masks are 1 at every position: plain feature mimicking, the control. No parameters.

    Args:
        channels: C of the fused map (not used).
        num_masks: M.
    """

    kind = "spatial"

    def __init__(self, channels: int, *, num_masks: int) -> None:
        super().__init__()
        _check_num_masks(num_masks)
        self.num_masks = num_masks

    def forward(self, fused: Tensor) -> Tensor:
        """(N, C, H, W) -> ones (N, M, H, W)."""
        n, _, h, w = fused.shape
        return fused.new_ones(n, self.num_masks, h, w)
