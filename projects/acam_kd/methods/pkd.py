"""PKD: distillation by Pearson correlation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from ..core.distiller import NOTHING_KNOWN, Distiller, check_weights
from ..core.errors import ConfigError
from ..core.features import BACKBONE, Channels, Features
from ..core.registry import DISTILLER_REGISTRY
from ..core.targets import Targets
from .parts.losses import check_shapes, full_precision
from .parts.masked import mean_squared_errors
from .parts.standardized import standardized
from .recipes import RECIPES

__all__ = ["PKD", "pearson_errors"]


def pearson_errors(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    r"""Compute, for each level, half the mean squared error of channels standardised over the batch.

    .. math:: L = \frac12 \text{mean} (\hat S - \hat T)^2
                = \frac{K-1}{K} \frac1C \sum_c (1 - r_c), \qquad K = NHW

    with Pearson's correlation r_c of channel c over images and positions (up to a 1e-6 that keeps constant channels
    finite). Scaling a channel by a positive factor, or shifting it, changes nothing. L is 0 for K = 1, where no
    deviation is defined.

    Args:
        student: (N, C, H', W') each, scaled bilinearly to H x W if the sizes differ.
        teacher: (N, C, H, W) each; it gets no gradient.

    Returns:
        (levels,), in float32 at least.

    Raises:
        ValueError: the channels or images of a level differ in number.
    """
    pairs = zip(student, teacher, strict=True)
    scaled = [own if own.shape[2:] == theirs.shape[2:] else _scaled(own, theirs) for own, theirs in pairs]
    for own, theirs in zip(scaled, teacher):
        check_shapes(own, theirs)
    maps = standardized([*scaled, *teacher])
    return mean_squared_errors(maps[: len(scaled)], maps[len(scaled) :]) / 2


@full_precision
def _scaled(student: Tensor, teacher: Tensor) -> Tensor:
    if not student.numel():
        return student.reshape(*student.shape[:2], *teacher.shape[2:])
    return F.interpolate(student, size=teacher.shape[2:], mode="bilinear", align_corners=False)


@DISTILLER_REGISTRY.register()
class PKD(Distiller):
    """A comparison of standardised features, so that only the correlation of channels counts; summed over levels.

    Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
    NeurIPS 2022:

        L = alpha / 2 mean (standardised(F_S) - standardised(F_T))^2

    with mean and deviation of each channel over the images and positions of one GPU's batch. There is nothing to
    train and no aligning convolution, so student and teacher need equally many channels. Their features may differ in
    scale, as those of two types of detector do.

    Recommended, on four levels (P2 to P5, or P3 to P6 of a one-stage detector): alpha = 10 for RetinaNet and
    RepPoints (the default) and 6 for Faster R-CNN.

    Args:
        student_channels, teacher_channels: the levels to distil, of a backbone.
        alpha: weight.

    Raises:
        ConfigError: the weight is out of range, or the channels of a level differ in number.

    Example:
        >>> import torch
        >>> method = PKD(student_channels={"p3": 16}, teacher_channels={"p3": 16}, alpha=6.0)
        >>> losses = method({"p3": torch.rand(2, 16, 12, 20)}, {"p3": torch.rand(2, 16, 12, 20)})
        >>> sorted(losses)
        ['loss_pkd_pearson']
    """

    reads = (BACKBONE,)
    recipes = RECIPES["PKD"]

    def __init__(self, student_channels: Channels, teacher_channels: Channels, *, alpha: float = 10.0) -> None:
        super().__init__(student_channels, teacher_channels)
        check_weights(alpha=alpha)
        for level, spec in self.student_levels.items():
            width = self.teacher_levels[level].channels
            if spec.channels != width:
                raise ConfigError(
                    "levels",
                    f"{level} with {spec.channels} channels in the student and {width} in the teacher",
                    "as many channels in both, since PKD has no aligning convolution",
                    hint="choose a {method} that aligns them, such as CWD or MGD, or other {levels}",
                )
        self.alpha = alpha

    def forward(self, student: Features, teacher: Features, targets: Targets = NOTHING_KNOWN) -> dict[str, Tensor]:
        """Return ``loss_pkd_pearson``."""
        errors = pearson_errors(
            [student[level] for level in self.levels], [teacher[level].detach() for level in self.levels]
        )
        self._step = dict(zip(self.levels, errors.detach()))
        return {"loss_pkd_pearson": self.alpha * errors.sum()}

    def metrics(self) -> dict[str, Tensor]:
        """Return ``<level>/pearson``: one minus the correlation, averaged over channels, between 0 and 2."""
        return {f"{level}/pearson": error for level, error in self._step.items()}
