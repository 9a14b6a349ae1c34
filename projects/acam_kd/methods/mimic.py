"""Plain feature mimicking, the control that every other method has to beat."""

from __future__ import annotations

from torch import Tensor

from ..core.distiller import NOTHING_KNOWN, Distiller, align_levels, check_weights
from ..core.features import Channels, Features
from ..core.registry import DISTILLER_REGISTRY
from ..core.targets import Targets
from .parts.masked import mean_squared_errors
from .parts.standardized import check_features, standardized
from .recipes import RECIPES

__all__ = ["Mimic"]


@DISTILLER_REGISTRY.register()
class Mimic(Distiller):
    """The mean squared error between the aligned student and the teacher, summed over levels.

    FitNets' hint loss (Romero et al., ICLR 2015) on every level of the pyramid.

    Args:
        student_channels, teacher_channels: the levels to distil.
        alpha: weight.
        features: ``"raw"``, or ``"standardized"``: every channel of both maps over the batch, as in PKD, so that the
            weight does not depend on the scale of the networks. A departure from the paper, which the recipes for
            detectors take.

    Raises:
        ConfigError: the weight is out of range, or the kind of features is not known.

    Example:
        >>> import torch
        >>> method = Mimic(student_channels={"p3": 16}, teacher_channels={"p3": 24}, alpha=1.0)
        >>> losses = method({"p3": torch.rand(2, 16, 12, 20)}, {"p3": torch.rand(2, 24, 12, 20)})
        >>> sorted(losses)
        ['loss_mimic_mse']
    """

    recipes = RECIPES["Mimic"]

    def __init__(
        self, student_channels: Channels, teacher_channels: Channels, *, alpha: float = 1.0, features: str = "raw"
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        check_weights(alpha=alpha)
        check_features(features)
        self.alpha, self.features = alpha, features
        self.align = align_levels(self.student_levels, self.teacher_levels)

    def forward(self, student: Features, teacher: Features, targets: Targets = NOTHING_KNOWN) -> dict[str, Tensor]:
        """Return ``loss_mimic_mse``."""
        maps = [self.align[level](student[level]) for level in self.levels]
        maps += [teacher[level].detach() for level in self.levels]
        if self.features == "standardized":
            maps = standardized(maps)
        errors = mean_squared_errors(maps[: len(self.levels)], maps[len(self.levels) :])
        self._step = dict(zip(self.levels, errors.detach()))
        return {"loss_mimic_mse": self.alpha * errors.sum()}

    def metrics(self) -> dict[str, Tensor]:
        """Return ``<level>/mse``."""
        return {f"{level}/mse": error for level, error in self._step.items()}
