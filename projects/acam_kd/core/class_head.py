"""What the class head of a detector predicts, of whatever engine it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

__all__ = ["ClassHead", "Predictions"]


@dataclass(frozen=True)
class Predictions:
    """Of one training step.

    Args:
        logits: (N, K, A, 1), of K classes for each of A anchors, or (R, K, 1, 1), for each of R regions.
        labels: (N, A, 1), or (R, 1, 1), int64, as in ``Targets``: what the student was trained with in this step.
        regions: what the teacher's head must be asked about to predict for the same places, of the engine's own type;
            None where it is asked everywhere.
    """

    logits: Tensor
    labels: Tensor
    regions: Any = None


class ClassHead(Protocol):
    """Reads the predictions of a student's class head."""

    def pop(self) -> Predictions:
        """Those of the last training forward, once."""

    def clear(self) -> None:
        """Forget what a training forward that failed half-way may have left."""
