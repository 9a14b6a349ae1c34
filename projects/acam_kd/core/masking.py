"""Adaptive spatial-channel masking (ASCM): learnable selection units turn the fused map into soft masks.

Spatial masks need M projections of the fused map, channel masks its mean over positions, and cross-attention gives both
for less than the map itself; ``make_masks`` knows when that will do.

Letters: N images, C channels, H x W positions, M masks. Paper: ACAM-KD, arXiv 2503.06307. Starting the
units from N(0, 0.01^2) is a reading; it is how MasKD starts its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .fusion import CrossAttentionFusion
from .registry import MASKING_REGISTRY

__all__ = ["ChannelMasking", "SpatialMasking", "UniformMasking", "make_masks"]

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
        return self.select(torch.einsum("mc,nchw->nmhw", self.units, fused))

    @staticmethod
    def select(projection: Tensor) -> Tensor:
        """The masks of a map of which the projection on the units is known, (N, M, H, W)."""
        return projection.sigmoid()


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


def make_masks(
    fusion: nn.Module, maskings: Mapping[str, nn.Module], student: Tensor, teacher: Tensor, *, standardize: bool = False
) -> dict[str, Tensor]:
    """The masks of every kind from the fused map of one level, the map itself left out where it can be.

    It can with cross-attention and the two maskings of the paper, together or alone, if the spatial masks' map
    is not standardised: the deviation of each of its channels is not to be had without the channel. Any other fusion
    or masking, a subclass of these too, gets the map.

    Args:
        fusion: (N, C, H, W) of student and teacher -> the fused map.
        maskings: kind -> masking.
        student, teacher: (N, C, H, W); one of them may be smaller, if cross-attention asks the other.
        standardize: standardise every channel of the fused map over positions for the spatial masks, its mean
            over channels for the channel masks.

    Returns:
        Kind -> masks.
    """
    spatial, channel = maskings.get("spatial"), maskings.get("channel")
    if (
        type(fusion) is CrossAttentionFusion
        and (spatial is None or (type(spatial) is SpatialMasking and not standardize))
        and (channel is None or type(channel) is ChannelMasking)
        and fusion.summarizes(student, mean=channel is not None)
    ):
        units = None if spatial is None else spatial.units
        projection, mean = fusion.summary(student, teacher, units, mean=channel is not None)
        masks = {} if projection is None else {"spatial": SpatialMasking.select(projection)}
        if mean is not None and channel is not None:
            masks["channel"] = channel(_standardized(mean, "channel") if standardize else mean)
        return masks
    fused = fusion(student, teacher)
    return {kind: masking(_standardized(fused, kind) if standardize else fused) for kind, masking in maskings.items()}


def _standardized(fused: Tensor, kind: str) -> Tensor:
    """Mean 0 and deviation 1: over positions for spatial masks, of the pooled channels for channel masks."""
    x = fused.to(torch.promote_types(fused.dtype, torch.float32))
    x, dims = (x, (2, 3)) if kind == "spatial" else (x.mean((2, 3), keepdim=True), (1,))
    deviation, mean = torch.std_mean(x, dims, correction=0, keepdim=True)
    return (x - mean) / (deviation + 1e-6)
