"""The attention maps of FKD and FGD, which several methods share.

Zhang & Ma, "Improve Object Detection with Feature-based Knowledge Distillation", ICLR 2021; Yang et al., "Focal and
Global Knowledge Distillation for Detectors", CVPR 2022.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["channel_attention", "spatial_attention"]


def spatial_attention(features: Tensor, temperature: float) -> Tensor:
    """Return HW softmax over positions of mean_c |F| / T: (N, C, H, W) -> (N, H, W), of mean 1 in every image."""
    n, _, h, w = features.shape
    energy = features.abs().mean(1).flatten(1)
    return (h * w * (energy / temperature).softmax(1)).view(n, h, w)


def channel_attention(features: Tensor, temperature: float) -> Tensor:
    """Return C softmax over channels of mean_hw |F| / T: (N, C, H, W) -> (N, C), of mean 1 in every image."""
    energy = features.abs().mean((2, 3))
    return features.shape[1] * (energy / temperature).softmax(1)
