"""The contract of a distillation method."""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch import Tensor, nn

from .features import BACKBONE, LOGITS, Features, Pyramid
from .targets import Targets

__all__ = ["NOTHING_KNOWN", "Distiller", "align_levels", "check_weights", "method_arguments"]

NOTHING_KNOWN = Targets()
"""For methods that need nothing but features."""


class Distiller(nn.Module):
    """Turns the features of student and teacher into named losses.

    Both pyramids have the same level names: the student's, whatever the teacher calls its levels.

    A method subclasses this, takes its hyper-parameters as further keyword arguments with defaults (their
    upper-case names are its config keys), registers itself in ``DISTILLER_REGISTRY``, and keeps to
    four rules, which the contract test checks for all registered methods:

    * ``forward`` returns weighted, finite 0-d losses under the keys ``loss_<method>_<term>``;
    * no gradient reaches the teacher's features;
    * every parameter gets a gradient at every step, or DistributedDataParallel stops;
    * diagnostics go through ``metrics``, never into the losses: the trainer sums every loss.

    Args:
        student, teacher: the levels to distil, with the same keys.
    """

    reads: tuple[str, ...] = (BACKBONE, LOGITS)
    """The taps whose levels the method can use; it is given no others."""
    needs: tuple[str, ...] = ()
    """What it looks at in ``Targets``: any of ``boxes``, ``labels``. What no method needs is not made."""

    def __init__(self, student: Pyramid, teacher: Pyramid) -> None:
        super().__init__()
        if student.keys() != teacher.keys():
            raise ValueError(f"levels differ: student {list(student)}, teacher {list(teacher)}")
        self.levels = list(student)

    def forward(self, student: Features, teacher: Features, targets: Targets = NOTHING_KNOWN) -> dict[str, Tensor]:
        """Return the losses of one step; features are (N, C, H, W) per level."""
        raise NotImplementedError

    def parts(self) -> list[Distiller]:
        """The methods that it is made of: itself."""
        return [self]

    def metrics(self) -> dict[str, Tensor]:
        """Diagnostics of the last step, 0-d and detached, under ``<level>/<quantity>``."""
        return {}

    def masks(self) -> dict[str, dict[str, Tensor]]:
        """Where the last step looked, for pictures: level -> kind -> masks, detached.

        Kinds are ``"spatial"``, (N, M, H, W), and ``"channel"``, (N, M, C). Empty for a method without masks.
        """
        return {}

    def warnings(self) -> dict[str, str]:
        """What is going wrong by the last step, place -> a plain sentence that names the level and the key to change.

        A place is reported once a run.
        """
        return {}


def align_levels(student: Pyramid, teacher: Pyramid) -> nn.ModuleDict:
    """One 1x1 convolution per level from the student's channels to the teacher's; none on logits.

    It starts as the identity where the channels match (a reading of the paper, which says nothing). Logits have a
    meaning, class by class, so they are compared as they are (a reading too; MasKD does so).
    """
    aligned = nn.ModuleDict()
    for level, spec in student.items():
        if spec.logits:
            aligned[level] = nn.Identity()
            continue
        conv = nn.Conv2d(spec.channels, teacher[level].channels, 1)
        if conv.in_channels == conv.out_channels:
            nn.init.dirac_(conv.weight)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        aligned[level] = conv
    return aligned


def check_weights(**weights: float) -> None:
    """Raise ValueError for a loss weight that is negative or not finite."""
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be finite and not negative, found {weight} (key: {name.upper()})")


def method_arguments(method: type) -> dict[str, Any]:
    """The hyper-parameters of a method, argument -> default: its constructor's keyword-only arguments."""
    parameters = inspect.signature(method).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
