"""The predicted classes of a detector, whatever engine it is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from .taps import Tap

__all__ = ["ClassHead", "Predictions"]


@dataclass(frozen=True)
class Predictions:
    """The class predictions of one training step.

    Args:
        logits: (N, K, A, 1), of K classes for each of A anchors, or (R, K, 1, 1), for each of R regions.
        labels: (N, A, 1), or (R, 1, 1), int64, as in ``Targets``: the labels that the student was trained with in this
            step. None if they are not known.
        regions: the regions that the teacher's head must be asked about to predict for the same places, of the
            engine's own type; None where it predicts everywhere.
    """

    logits: Tensor
    labels: Tensor | None = None
    regions: Any = None


class ClassHead(Protocol):
    """Reads the predictions of a student's class head from taps."""

    by_regions: bool
    """It predicts for regions, which are chosen by labels; so it cannot be asked about unlabelled images."""

    @property
    def taps(self) -> Sequence[Tap]:
        """The taps that it reads."""

    def read(self) -> Predictions:
        """Return the predictions of the step that was just recorded."""
