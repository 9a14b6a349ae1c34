"""The cosine distance at every position, for teachers whose features mean something by their direction."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ..core.distiller import NOTHING_KNOWN, Distiller, align_levels, check_weights
from ..core.features import BACKBONE, Channels, Features
from ..core.registry import DISTILLER_REGISTRY
from ..core.targets import Targets
from .parts.losses import check_shapes, full_precision

__all__ = ["Cosine", "cosine_distance"]


@full_precision
def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compute the mean over images and positions of one minus the cosine between the two vectors of channels.

    .. math:: L = \frac{1}{N H W} \sum_{n,p} \left(1 - \frac{S_{np} \cdot T_{np}}{|S_{np}| |T_{np}|}\right)

    It is 0 for equal directions, 1 for orthogonal and 2 for opposite ones, whatever the lengths. A vector of zeros is
    orthogonal to all.

    Args:
        student, teacher: (N, C, H, W).

    Returns:
        0-d.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> import torch
        >>> x = torch.rand(1, 4, 2, 2)
        >>> round(float(cosine_distance(x, 3 * x)), 6), round(float(cosine_distance(x, -x)), 6)
        (0.0, 2.0)
    """
    check_shapes(student, teacher)
    distances = 1 - F.cosine_similarity(student, teacher, dim=1)
    return distances.sum() / max(distances.numel(), 1)


@DISTILLER_REGISTRY.register()
class Cosine(Distiller):
    """One minus the cosine of aligned student and teacher at every position, averaged, summed over levels.

    It is in common use for teachers trained without labels, as DINO: their features are compared by direction, and
    their scale differs from a detector's. The weight is ours; there is no published one for detectors.

    Args:
        student_channels, teacher_channels: the levels to distil, of a backbone.
        alpha: weight.

    Raises:
        ConfigError: the weight is out of range.

    Example:
        >>> import torch
        >>> method = Cosine(student_channels={"p4": 16}, teacher_channels={"p4": 24})
        >>> losses = method({"p4": torch.rand(2, 16, 12, 20)}, {"p4": torch.rand(2, 24, 12, 20)})
        >>> sorted(losses)
        ['loss_cosine_distance']
    """

    reads = (BACKBONE,)

    def __init__(self, student_channels: Channels, teacher_channels: Channels, *, alpha: float = 1.0) -> None:
        super().__init__(student_channels, teacher_channels)
        check_weights(alpha=alpha)
        self.alpha = alpha
        self.align = align_levels(self.student_levels, self.teacher_levels)

    def forward(self, student: Features, teacher: Features, targets: Targets = NOTHING_KNOWN) -> dict[str, Tensor]:
        """Return ``loss_cosine_distance``."""
        distances = {
            level: cosine_distance(self.align[level](student[level]), teacher[level].detach()) for level in self.levels
        }
        self._step = {level: distance.detach() for level, distance in distances.items()}
        return {"loss_cosine_distance": self.alpha * sum(distances.values())}  # type: ignore[dict-item]

    def metrics(self) -> dict[str, Tensor]:
        """Return ``<level>/distance``."""
        return {f"{level}/distance": distance for level, distance in self._step.items()}
