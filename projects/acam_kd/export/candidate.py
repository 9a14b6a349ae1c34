"""A model that is evaluated and timed beside others, of whichever engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

__all__ = ["Candidate"]


@dataclass(frozen=True)
class Candidate:
    """A model to measure.

    Args:
        name: as the user gave it.
        network: has the interface of torchvision's models in evaluation.
        model: the name of its kind, for messages.
        outputs: the names of its outputs, as in ``Metadata``.
        categories: label -> name.
        file: its weights, or the exported file.
        parameters: their number; None for an exported file, which does not say.
        device: of the network.
    """

    name: str
    network: nn.Module
    model: str
    outputs: tuple[str, ...]
    categories: Mapping[int, str]
    file: Path
    parameters: int | None
    device: torch.device
