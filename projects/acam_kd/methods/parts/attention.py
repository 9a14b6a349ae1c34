"""The attention maps of FKD and FGD, which several methods share.

Zhang & Ma, "Improve Object Detection with Feature-based Knowledge Distillation", ICLR 2021; Yang et al., "Focal and
Global Knowledge Distillation for Detectors", CVPR 2022.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .losses import full_precision

__all__ = ["Attention", "attention_of"]


class Attention(NamedTuple):
    """The attention of a map; the mean of each part is 1 in every image."""

    spatial: Tensor
    """(N, H, W): HW softmax over positions of mean_c |F| / T."""
    channel: Tensor
    """(N, C): C softmax over channels of mean_hw |F| / T."""


def attention_of(features: Tensor, temperature: float) -> Attention:
    """Compute the attention of features, (N, C, H, W), in float32 at least."""
    return Attention(*_attention(features, temperature))


@full_precision
def _attention(features: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    n, c, h, w = features.shape
    size = features.abs()
    spatial, channel = size.mean(1).flatten(1), size.mean((2, 3))
    return (h * w * (spatial / temperature).softmax(1)).view(n, h, w), c * (channel / temperature).softmax(1)
