"""Helpers of the methods that hide a part of the student's map and rebuild the teacher's from the rest."""

from __future__ import annotations

from torch import nn

from ...core.errors import ConfigError

__all__ = ["Generator", "check_fraction"]


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
