"""NKD: KD as two cross-entropies, of the target class and, normalised, of the others."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..core.distiller import NOTHING_KNOWN, Distiller, check_weights
from ..core.features import CLASSES, LOGITS, Channels, Features
from ..core.registry import DISTILLER_REGISTRY
from ..core.targets import Targets
from .parts.logits import (
    agreement,
    check_several_classes,
    labelled_positions,
    softened,
    without_target,
)
from .parts.losses import check_temperature, full_precision
from .recipes import RECIPES

__all__ = ["NKD", "nontarget_cross_entropy", "target_cross_entropy"]


@full_precision
def target_cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    r"""Compute the cross-entropy with the label, weighed by the teacher's probability of it; not softened.

    .. math:: L = - \mathrm{mean}_n \, p^T_y \log p^S_y

    Args:
        student, teacher: logits, (P, K).
        labels: (P,) int64, in 0..K-1.
    """
    certainty = (-F.cross_entropy(teacher, labels, reduction="none")).exp()
    return (certainty * F.cross_entropy(student, labels, reduction="none")).sum() / max(len(labels), 1)


@full_precision
def nontarget_cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Compute the cross-entropy among the classes other than the target; 0 if there are only two classes.

    .. math:: L = - T^2 \, \mathrm{mean}_n \sum_{i \ne y} n^T_i \log n^S_i,
              \quad n = \mathrm{softmax}_{i \ne y}(z_i / T)

    Args:
        student, teacher: logits, (P, K) with K >= 2.
        labels: (P,) int64, in 0..K-1.
        temperature: T.
    """
    student, teacher = (without_target(softened(x, temperature), labels) for x in (student, teacher))
    entropy = F.cross_entropy(student, teacher.softmax(1), reduction="none")
    return temperature**2 * entropy.sum() / max(len(labels), 1)


@DISTILLER_REGISTRY.register()
class NKD(Distiller):
    """Normalised KD of predicted classes: L = alpha * L_target + gamma * L_nontarget.

    Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss
    and Customized Soft Labels", ICCV 2023; see ``target_cross_entropy`` and ``nontarget_cross_entropy``. Both are
    cross-entropies, not divergences, so they are positive also where student and teacher agree. The paper classifies
    images; here every position of a segmentation map, or every region or anchor of a class head, is one.

    Both terms are means over the positions whose label is one of the predicted classes. Positions without a label are
    left out. The background class of a RoI head counts like any other. A dense head predicts each class with a sigmoid
    and has none for the background. There only foreground anchors are compared, by a softmax over the K classes in
    place of the sigmoids. LD (CVPR 2022) does so for its classification; for NKD it is an assumption. Without any
    such position the losses are 0. With exactly two classes L_nontarget is 0.

    Published: alpha 1, temperature 1, gamma 1.5 for convolutional networks and 1 for DeiT on ImageNet. Nothing is
    published for detectors and segmentation; the same values are an assumption.

    Args:
        student_channels, teacher_channels: the levels to distil, of two classes or more.
        alpha: weight of L_target, which the paper leaves at 1.
        gamma: weight of L_nontarget.
        temperature: T of L_nontarget, by which logits are divided; that term is multiplied by its square.

    Raises:
        ConfigError: a weight or the temperature is out of range, or a level has one class, over which a softmax is
            constant. In ``forward``: a level has no labels.

    Example:
        >>> import torch
        >>> from acam_kd import Targets
        >>> method = NKD(student_channels={"classes": 10}, teacher_channels={"classes": 10})
        >>> known = Targets(labels={"classes": torch.randint(10, (8,))})
        >>> losses = method({"classes": torch.rand(8, 10)}, {"classes": torch.rand(8, 10)}, known)
        >>> sorted(losses)
        ['loss_nkd_nontarget', 'loss_nkd_target']
    """

    reads = (LOGITS, CLASSES)
    needs = ("labels",)
    recipes = RECIPES["NKD"]

    def __init__(
        self,
        student_channels: Channels,
        teacher_channels: Channels,
        *,
        alpha: float = 1.0,
        gamma: float = 1.5,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        check_weights(alpha=alpha, gamma=gamma)
        check_temperature(temperature)
        check_several_classes(self.student_levels, method="NKD")
        self.alpha, self.gamma, self.temperature = alpha, gamma, temperature

    def forward(self, student: Features, teacher: Features, targets: Targets = NOTHING_KNOWN) -> dict[str, Tensor]:
        """Return ``loss_nkd_target`` and ``loss_nkd_nontarget``."""
        compared = labelled_positions(student, teacher, targets, method="NKD")
        self._step = agreement(compared)
        target = sum(target_cross_entropy(*level) for level in compared.values())
        others = sum(nontarget_cross_entropy(*level, self.temperature) for level in compared.values())
        return {"loss_nkd_target": self.alpha * target, "loss_nkd_nontarget": self.gamma * others}  # type: ignore[dict-item]

    def metrics(self) -> dict[str, Tensor]:
        """Return ``<level>/positions``, the compared ones, and ``<level>/agreement`` on the likeliest class there."""
        return dict(self._step)
