"""DKD: KD decoupled into the target class and the other classes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.distiller import NOTHING_KNOWN, Distiller, check_weights
from ..core.features import CLASSES, LOGITS, Channels, Features
from ..core.registry import DISTILLER_REGISTRY
from ..core.targets import Targets
from .parts.logits import (
    agreement,
    check_several_classes,
    kl_divergence,
    labelled_positions,
    softened,
    without_target,
)
from .parts.losses import check_temperature, full_precision
from .recipes import RECIPES

__all__ = ["DKD", "nontarget_kl", "target_kl"]


@full_precision
def target_kl(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Compute TCKD: the KL divergence of the two probabilities "the target" and "any other class".

    .. math:: L = T^2 \, \mathrm{mean}_n \, KL((p^T_y, 1 - p^T_y) \,\Vert\, (p^S_y, 1 - p^S_y)),
              \quad p = \mathrm{softmax}(z / T)

    The two probabilities are a softmax of z_y / T and the logsumexp of the other z_i / T, so 1 - p is never formed.

    Args:
        student, teacher: logits, (P, K) with K >= 2.
        labels: (P,) int64, in 0..K-1.
        temperature: T.
    """
    student, teacher = (_target_and_others(softened(x, temperature), labels) for x in (student, teacher))
    return temperature**2 * kl_divergence(student, teacher).sum() / max(len(labels), 1)


@full_precision
def nontarget_kl(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Compute NCKD: the KL divergence among the classes other than the target; 0 if there are only two classes.

    .. math:: L = T^2 \, \mathrm{mean}_n \,
              KL(\mathrm{softmax}_{i \ne y}(z^T_i / T) \,\Vert\, \mathrm{softmax}_{i \ne y}(z^S_i / T))

    Args:
        student, teacher: logits, (P, K) with K >= 2.
        labels: (P,) int64, in 0..K-1.
        temperature: T.
    """
    student, teacher = (without_target(softened(x, temperature), labels) for x in (student, teacher))
    return temperature**2 * kl_divergence(student, teacher).sum() / max(len(labels), 1)


def _target_and_others(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logits of the target and of all other classes together, (P, K) -> (P, 2)."""
    others = without_target(logits, labels).logsumexp(1, keepdim=True)
    return torch.cat([logits.gather(1, labels[:, None]), others], 1)


@DISTILLER_REGISTRY.register()
class DKD(Distiller):
    """Decoupled KD of predicted classes, with separate weights for the target and for the other classes.

    Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022:
    L = alpha * TCKD + beta * NCKD, see ``target_kl`` and ``nontarget_kl``. KD is TCKD + (1 - p^T_y) NCKD, which
    silences the second term wherever the teacher is sure.

    Both terms are means over the positions whose label is one of the predicted classes. Positions without a label are
    left out. The background class of a RoI head counts like any other, as in the official code. A dense head predicts
    each class with a sigmoid and has none for the background. There only foreground anchors are compared, by a softmax
    over the K classes in place of the sigmoids. LD (CVPR 2022) does so for its classification; for DKD it is an
    assumption. Without any such position the losses are 0. There is no warm-up of the weights.

    Published: alpha 1, beta 0.25, temperature 1 for the class head of Faster R-CNN; alpha 1, temperature 1, beta 0.5
    to 2 for ImageNet; alpha 1, beta 2 to 8, temperature 4 for CIFAR. Nothing is published for RetinaNet, FCOS and
    segmentation.

    With exactly two classes NCKD is 0, and DKD is alpha times KD at those positions.

    Args:
        student_channels, teacher_channels: the levels to distil, of two classes or more.
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: T, by which logits are divided; both terms are multiplied by its square.

    Raises:
        ConfigError: a weight or the temperature is out of range, or a level has one class, over which a softmax is
            constant. In ``forward``: a level has no labels.

    Example:
        >>> import torch
        >>> from acam_kd import Targets
        >>> method = DKD(student_channels={"classes": 10}, teacher_channels={"classes": 10})
        >>> known = Targets(labels={"classes": torch.randint(10, (8,))})
        >>> losses = method({"classes": torch.rand(8, 10)}, {"classes": torch.rand(8, 10)}, known)
        >>> sorted(losses)
        ['loss_dkd_nontarget', 'loss_dkd_target']
    """

    reads = (LOGITS, CLASSES)
    needs = ("labels",)
    recipes = RECIPES["DKD"]

    def __init__(
        self,
        student_channels: Channels,
        teacher_channels: Channels,
        *,
        alpha: float = 1.0,
        beta: float = 0.25,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        check_weights(alpha=alpha, beta=beta)
        check_temperature(temperature)
        check_several_classes(self.student_levels, method="DKD")
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def forward(self, student: Features, teacher: Features, targets: Targets = NOTHING_KNOWN) -> dict[str, Tensor]:
        """Return ``loss_dkd_target`` and ``loss_dkd_nontarget``."""
        compared = labelled_positions(student, teacher, targets, method="DKD")
        self._step = agreement(compared)
        tckd = sum(target_kl(*level, self.temperature) for level in compared.values())
        nckd = sum(nontarget_kl(*level, self.temperature) for level in compared.values())
        return {"loss_dkd_target": self.alpha * tckd, "loss_dkd_nontarget": self.beta * nckd}  # type: ignore[dict-item]

    def metrics(self) -> dict[str, Tensor]:
        """Return ``<level>/positions``, the compared ones, and ``<level>/agreement`` on the likeliest class there."""
        return dict(self._step)
