"""KD: the teacher's predicted classes as soft labels."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..core.distiller import NOTHING_KNOWN, Distiller, check_weights
from ..core.errors import ConfigError
from ..core.features import CLASSES, LOGITS, Channels, Features
from ..core.registry import DISTILLER_REGISTRY
from ..core.targets import Targets
from .parts.logits import kl_divergence, softened
from .parts.losses import check_shapes, check_temperature, full_precision
from .recipes import RECIPES

__all__ = ["KD", "binary_kd_loss", "kd_loss"]


@full_precision
def kd_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Compute the KL divergence of softmax predictions, averaged over all positions of all images.

    .. math:: L = T^2 \, \mathrm{mean}_n \, KL(\mathrm{softmax}(z^T_n / T) \,\Vert\, \mathrm{softmax}(z^S_n / T))

    Args:
        student, teacher: logits, (N, K, ...), of equal shape.
        temperature: T.

    Raises:
        ValueError: the shapes differ.
    """
    check_shapes(student, teacher)
    divergence = kl_divergence(softened(student, temperature), softened(teacher, temperature))
    return temperature**2 * divergence.sum() / max(divergence.numel(), 1)


@full_precision
def binary_kd_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0, weights: Tensor | None = None) -> Tensor:
    r"""Compute the KL divergence of sigmoid predictions, summed over anchors and classes, per object of the teacher.

    .. math:: L = \frac{T^2 \sum_{a,k} w_a KL(\sigma(z^T_{ak} / T) \,\Vert\, \sigma(z^S_{ak} / T))}
              {\max(1, \sum_a \max_k \sigma(z^T_{ak}))}

    The divergence is softplus(s) - softplus(t) - sigmoid(t) (s - t). It is exact for very negative logits, of which a
    dense head has millions.

    Args:
        student, teacher: logits, (N, K, ...), of equal shape.
        temperature: T. The denominator, the teacher's own count of foreground anchors, is taken at T = 1.
        weights: w, (N, ...), of the anchors; 1 each if left out.

    Raises:
        ValueError: the shapes differ.
    """
    check_shapes(student, teacher)
    objects = teacher.amax(1).sigmoid().sum().clamp_min(1)
    s, t = softened(student, temperature), softened(teacher, temperature)
    divergence = F.softplus(s) - F.softplus(t) - t.sigmoid() * (s - t)
    if weights is not None:
        divergence = divergence * weights[:, None]
    return temperature**2 * divergence.sum() / objects


@DISTILLER_REGISTRY.register()
class KD(Distiller):
    """Knowledge distillation of predicted classes: of a segmentation map, or of a detector's class head.

    Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", NIPS workshop 2014, arXiv 1503.02531.
    On segmentation maps it follows CIRKD (Yang et al., "Cross-Image Relational Knowledge Distillation for Semantic
    Segmentation", CVPR 2022). Every position counts, also unlabelled ones.

    Where a softmax predicts the classes, of a map or of a RoI head's regions, the loss is ``kd_loss``, a mean over
    positions. For dense heads, with a sigmoid for each class, no formula is official. The loss is then
    ``binary_kd_loss``, a sum divided by the teacher's own count of foreground anchors, which is an assumption. It
    needs no labels, and works with one class.

    Published for segmentation: alpha 1, temperature 1 (CIRKD). Nothing is published for detectors; the same values are
    an assumption. For the classification of images the temperature is 4 on CIFAR, 1 on ImageNet.

    Args:
        student_channels, teacher_channels: the levels to distil.
        alpha: weight.
        temperature: T, by which logits are divided; the loss is multiplied by its square.

    Raises:
        ConfigError: the weight or the temperature is out of range, or a softmax is over one class.

    Example:
        >>> import torch
        >>> method = KD(student_channels={"classes": 10}, teacher_channels={"classes": 10}, temperature=4.0)
        >>> losses = method({"classes": torch.rand(8, 10)}, {"classes": torch.rand(8, 10)})
        >>> sorted(losses)
        ['loss_kd_kl']
    """

    reads = (LOGITS, CLASSES)
    recipes = RECIPES["KD"]

    def __init__(
        self, student_channels: Channels, teacher_channels: Channels, *, alpha: float = 1.0, temperature: float = 1.0
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        check_weights(alpha=alpha)
        check_temperature(temperature)
        self.alpha, self.temperature = alpha, temperature
        self.sigmoid = {level: spec.sigmoid for level, spec in self.student_levels.items()}
        if alone := [s for s, spec in self.student_levels.items() if spec.channels < 2 and not spec.sigmoid]:
            raise ConfigError(
                "levels", f"{alone[0]} with 1 class", "2 classes or more", "a softmax over one class is constant"
            )

    def forward(self, student: Features, teacher: Features, targets: Targets = NOTHING_KNOWN) -> dict[str, Tensor]:
        """Return ``loss_kd_kl``."""
        losses, self._step = [], {}
        for level in self.levels:
            student_logits, teacher_logits = student[level], teacher[level].detach()
            loss = binary_kd_loss if self.sigmoid[level] else kd_loss
            losses.append(loss(student_logits, teacher_logits, self.temperature))
            if student_logits.numel():
                self._step[level] = _agreement(student_logits.detach(), teacher_logits, self.sigmoid[level])
        return {"loss_kd_kl": self.alpha * sum(losses)}  # type: ignore[dict-item]

    def metrics(self) -> dict[str, Tensor]:
        """Return ``<level>/agreement``, the share of positions at which both prefer the same class.

        On sigmoid heads the weight of a position is the teacher's largest probability there.
        """
        return {f"{level}/agreement": agreement for level, agreement in self._step.items()}


def _agreement(student: Tensor, teacher: Tensor, sigmoid: bool) -> Tensor:
    same = (student.argmax(1) == teacher.argmax(1)).float()
    if not sigmoid:
        return same.mean()
    weight = teacher.float().amax(1).sigmoid()
    return (weight * same).sum() / weight.sum().clamp_min(1e-12)
