"""Helpers of the methods that hide a part of the student's map and rebuild the teacher's from the rest."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError

__all__ = ["Generator", "check_fraction", "hide_largest", "rebuilt_of_two"]


class Generator(nn.Sequential):
    """A network that rebuilds a map from the rest of it: 3x3 convolution, ReLU, 3x3 convolution.

    Its input and output are (N, C, H, W).

    Yang et al., "Masked Generative Distillation", ECCV 2022. It is thrown away after training.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )


def check_fraction(**fractions: float) -> None:
    """Raise ConfigError for a fraction that is not between 0 and 1."""
    for name, fraction in fractions.items():
        if not 0 <= fraction <= 1:
            raise ConfigError(name, fraction, "between 0 and 1")


def hide_largest(attention: Tensor, fraction: float) -> Tensor:
    """Return 0 for the floor(fraction * K) largest values of each row, 1 for the others: (N, K) -> (N, K)."""
    count = math.floor(fraction * attention.shape[1] + 1e-9)  # 0.29 of 100 is 29
    hidden = attention.topk(count, dim=1).indices
    return torch.ones_like(attention).scatter(1, hidden, 0.0)


def rebuilt_of_two(
    features: Tensor, spatial: Tensor, channel: Tensor, generators: tuple[nn.Module, nn.Module], weights: Tensor
) -> Tensor:
    """Rebuild a map twice, after positions and after channels were hidden, and return the weighted sum.

    Args:
        features: (N, C, H, W).
        spatial: (N, 1, H, W), 0 where a position is hidden.
        channel: (N, C), 0 where a channel is hidden.
        generators: for the map without these positions, and for the one without these channels.
        weights: (2,), of the two results.
    """
    by_position = generators[0](spatial.to(features) * features)
    by_channel = generators[1](channel[..., None, None].to(features) * features)
    summed: Tensor = weights[0] * by_position + weights[1] * by_channel
    return summed
