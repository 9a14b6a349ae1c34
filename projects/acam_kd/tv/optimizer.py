"""The optimizer of a run and the curve of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from .run import Settings

__all__ = ["build_optimizer", "learning_rate_curve"]

POWER = 0.9
"""The exponent of the polynomial schedule, as in DeepLab's and torchvision's recipes."""


def build_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Build SGD or AdamW for all parameters that learn, those of the method included."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=0.05)
    return torch.optim.SGD(parameters, settings.learning_rate, momentum=0.9, weight_decay=1e-4)


def learning_rate_curve(settings: Settings) -> Callable[[int], float]:
    """Return the factor of the learning rate at a step: a linear warm-up, then a cosine or a polynomial to zero."""
    warmup = min(settings.warmup, settings.iterations // 4)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, settings.iterations - warmup)
        return (1 - done) ** POWER if settings.schedule == "poly" else 0.5 * (1 + math.cos(math.pi * done))

    return factor
