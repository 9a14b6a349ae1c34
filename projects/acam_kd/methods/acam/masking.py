"""Adaptive spatial-channel masking (ASCM): learnable selection units turn the fused map into soft masks.

Spatial masks need M projections of the fused map, channel masks its mean over positions. Cross-attention gives both
at less cost than the map itself; ``make_masks`` knows when they are enough.

A masking is a class in ``MASKING_REGISTRY``, one of your own too. It is a module with these parts:

* the class attribute ``kind``: ``"spatial"`` for masks over positions, ``"channel"`` for masks over channels;
* a constructor ``(channels, *, num_masks)`` for spatial masks, or ``(*, num_masks)`` for channel masks;
* ``forward(fused)``, from the fused map, (N, C, H, W), to masks in [0, 1]: (N, M, H, W) or (N, M, C).

Every parameter must get a gradient from the masks. A masking without parameters gets the teacher's map.

Letters: N images, C channels, H x W positions, M masks. Paper: ACAM-KD, arXiv 2503.06307. The units start from
N(0, 0.01^2), as the tokens of MasKD do. That is an assumption; the paper does not say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.registry import MASKING_REGISTRY
from .fusion import CrossAttentionFusion, Summary

__all__ = ["ChannelMasking", "FusedLevel", "SpatialMasking", "UniformMasking", "make_masks"]

INIT_STD = 0.01


def _check_num_masks(num_masks: int) -> None:
    if num_masks < 1:
        raise ConfigError("num_masks", num_masks, ">= 1")


def _units(num_masks: int, width: int) -> nn.Parameter:
    _check_num_masks(num_masks)
    return nn.Parameter(torch.randn(num_masks, width) * INIT_STD)


@MASKING_REGISTRY.register()
class SpatialMasking(nn.Module):
    """M masks over positions, M_s = sigmoid(m_s z), for the units m_s and the fused map z.

    Args:
        channels: C of the fused map.
        num_masks: M; 6 for detection, the number of classes for segmentation.

    Attributes:
        units: (M, C), learnt.

    Raises:
        ConfigError: ``num_masks`` is below 1.

    Example:
        >>> masking = SpatialMasking(64, num_masks=6)
        >>> masking.units.shape, masking(torch.randn(2, 64, 4, 5)).shape
        (torch.Size([6, 64]), torch.Size([2, 6, 4, 5]))
    """

    kind = "spatial"

    def __init__(self, channels: int, *, num_masks: int) -> None:
        super().__init__()
        self.units = _units(num_masks, channels)

    def forward(self, fused: Tensor) -> Tensor:
        """Compute the masks, (N, C, H, W) -> (N, M, H, W)."""
        return self.select(torch.einsum("mc,nchw->nmhw", self.units, fused))

    @staticmethod
    def select(projection: Tensor) -> Tensor:
        """Compute the masks from the map's projection on the units, (N, M, H, W) both."""
        return projection.sigmoid()


@MASKING_REGISTRY.register()
class ChannelMasking(nn.Module):
    """M masks over channels, M_c = sigmoid(m_c v), for the mean v of the fused map over positions.

    Each unit m_c is one number, so the masks differ by one slope each.

    Args:
        num_masks: M, as in ``SpatialMasking``.

    Attributes:
        units: (M, 1), learnt.

    Raises:
        ConfigError: ``num_masks`` is below 1.

    Example:
        >>> masking = ChannelMasking(num_masks=6)
        >>> masking.units.shape, masking(torch.randn(2, 64, 4, 5)).shape
        (torch.Size([6, 1]), torch.Size([2, 6, 64]))
    """

    kind = "channel"

    def __init__(self, *, num_masks: int) -> None:
        super().__init__()
        self.units = _units(num_masks, 1)

    def forward(self, fused: Tensor) -> Tensor:
        """Compute the masks, (N, C, H, W) -> (N, M, C)."""
        return (self.units * fused.mean((2, 3)).unsqueeze(1)).sigmoid()


@MASKING_REGISTRY.register()
class UniformMasking(nn.Module):
    """Masks that are 1 at every position: plain feature mimicking, the control. It has no parameters.

    Args:
        channels: C of the fused map (not used).
        num_masks: M, as in ``SpatialMasking``.

    Raises:
        ConfigError: ``num_masks`` is below 1.
    """

    kind = "spatial"

    def __init__(self, channels: int, *, num_masks: int) -> None:
        super().__init__()
        _check_num_masks(num_masks)
        self.num_masks = num_masks

    def forward(self, fused: Tensor) -> Tensor:
        """Return ones, (N, C, H, W) -> (N, M, H, W)."""
        n, _, h, w = fused.shape
        return fused.new_ones(n, self.num_masks, h, w)


@dataclass(frozen=True)
class FusedLevel:
    """The modules and the features of one level, from which masks are made.

    Args:
        fusion: a module from (N, C, H, W) of student and teacher to the fused map.
        maskings: kind -> masking.
        student, teacher: (N, C, H, W); with cross-attention the key/value source may be the smaller one.
    """

    fusion: nn.Module
    maskings: Mapping[str, nn.Module]
    student: Tensor
    teacher: Tensor


def make_masks(levels: Sequence[FusedLevel], *, standardize: bool = False) -> list[dict[str, Tensor]]:
    """Make the masks of every kind from the fused map of each level, without the map itself where possible.

    It is possible with cross-attention and the two maskings of the paper, together or alone. It is impossible where
    the map is standardised for spatial masks: a channel's standard deviation needs the whole channel. Any other
    fusion or masking, also a subclass of these, gets the map.

    Args:
        levels: of one batch.
        standardize: standardise every channel of the fused map over positions for the spatial masks, and its mean
            over channels for the channel masks.

    Returns:
        Kind -> masks, of each level.
    """
    found: list[dict[str, Tensor]] = [{} for _ in levels]
    parts: dict[int, Summary] = {}
    for i, level in enumerate(levels):
        if summary := _summary(level, standardize=standardize):
            parts[i] = summary
            continue
        fused = level.fusion(level.student, level.teacher)
        found[i] = {
            kind: masking(_standardized(fused, kind) if standardize else fused)
            for kind, masking in level.maskings.items()
        }
    projections = {i: part.projection for i, part in parts.items() if part.projection is not None}
    for i, masks in zip(projections, _spatial([*projections.values()])):
        found[i]["spatial"] = masks
    means = {i: part.mean for i, part in parts.items() if part.mean is not None}
    if standardize:
        means = {i: _standardized(mean, "channel") for i, mean in means.items()}
    maskings = [levels[i].maskings["channel"] for i in means]
    for i, masks in zip(means, _channel(maskings, [*means.values()])):
        found[i]["channel"] = masks
    return found


def _summary(level: FusedLevel, *, standardize: bool) -> Summary | None:
    """Return what the masks of a level need of its fused map, or None where they need the map."""
    fusion, spatial, channel = level.fusion, level.maskings.get("spatial"), level.maskings.get("channel")
    mean = channel is not None
    if (
        type(fusion) is not CrossAttentionFusion
        or not (spatial is None or (type(spatial) is SpatialMasking and not standardize))
        or not (channel is None or type(channel) is ChannelMasking)
        or not fusion.summarizes(level.student, level.teacher, mean=mean)
    ):
        return None
    units = spatial.units if isinstance(spatial, SpatialMasking) else None
    return fusion.summary(level.student, level.teacher, units, mean=mean)


def _spatial(projections: list[Tensor]) -> Sequence[Tensor]:
    """Compute the masks of all levels from their projections; in float32 at least, and at once where that is possible.

    On a GPU five levels in one kernel cost a fifth.
    """
    if len(projections) < 2 or len({(x.shape[:2], x.dtype) for x in projections}) > 1:
        return [SpatialMasking.select(x.to(torch.promote_types(x.dtype, torch.float32))) for x in projections]
    joined = torch.cat([x.flatten(2) for x in projections], 2)
    masks = SpatialMasking.select(joined.to(torch.promote_types(joined.dtype, torch.float32)))
    split = torch.split_with_sizes(masks, [x.shape[2:].numel() for x in projections], 2)
    return [x.unflatten(2, projection.shape[2:]) for x, projection in zip(split, projections)]  # type: ignore[no-untyped-call]


def _channel(maskings: Sequence[nn.Module], means: list[Tensor]) -> Sequence[Tensor]:
    """Compute the masks of all levels from the means, at once where that is possible."""
    units: list[Tensor] = [masking.units for masking in maskings if isinstance(masking, ChannelMasking)]
    if len(means) < 2 or len({x.shape for x in means}) > 1 or len({x.shape for x in units}) > 1:
        return [masking(mean) for masking, mean in zip(maskings, means)]
    masks: Tensor = (torch.stack(units).unsqueeze(1) * torch.stack(means).flatten(2).unsqueeze(2)).sigmoid()
    return masks.unbind()


def _standardized(fused: Tensor, kind: str) -> Tensor:
    """Standardise a map to mean 0 and standard deviation 1, as the masks of a kind need it.

    For spatial masks that is over positions, for channel masks over the channels of the map's mean.
    """
    x = fused.to(torch.promote_types(fused.dtype, torch.float32))
    x, dims = (x, (2, 3)) if kind == "spatial" else (x.mean((2, 3), keepdim=True), (1,))
    deviation, mean = torch.std_mean(x, dims, correction=0, keepdim=True)
    return (x - mean) / (deviation + 1e-6)
