"""KD: the teacher's predicted classes as soft labels."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..distiller import NOTHING_KNOWN, Distiller, check_weights
from ..features import CLASSES, LOGITS, Features, Pyramid
from ..logits import kl_divergence, softened
from ..losses import check_shapes, check_temperature, full_precision
from ..registry import DISTILLER_REGISTRY
from ..targets import Targets

__all__ = ["KD", "binary_kd_loss", "kd_loss"]


@full_precision
def kd_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    r"""KL divergence of softmax predictions, averaged over all positions of all images.

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
def binary_kd_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    r"""KL divergence of sigmoid predictions, summed over anchors and classes, per object that the teacher sees.

    .. math:: L = \frac{T^2 \sum_{a,k} KL(\sigma(z^T_{ak} / T) \,\Vert\, \sigma(z^S_{ak} / T))}
              {\max(1, \sum_a \max_k \sigma(z^T_{ak}))}

    The divergence is softplus(s) - softplus(t) - sigmoid(t) (s - t), exact for the very negative logits of which
    a dense head has millions.

    Args:
        student, teacher: logits, (N, K, ...), of equal shape.
        temperature: T; the denominator, the teacher's own count of foreground anchors, is taken at T = 1.

    Raises:
        ValueError: the shapes differ.
    """
    check_shapes(student, teacher)
    objects = teacher.amax(1).sigmoid().sum().clamp_min(1)
    s, t = softened(student, temperature), softened(teacher, temperature)
    divergence = F.softplus(s) - F.softplus(t) - t.sigmoid() * (s - t)
    return temperature**2 * divergence.sum() / objects


@DISTILLER_REGISTRY.register()
class KD(Distiller):
    """Knowledge distillation of predicted classes: of a segmentation map, or of a detector's class head.

    Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", NIPS workshop 2014, arXiv 1503.02531.
    Per position of a segmentation map as in CIRKD (Yang et al., "Cross-Image Relational Knowledge Distillation for
    Semantic Segmentation", CVPR 2022), which leaves out no position, labelled or not.

    Where a softmax predicts the classes, a map or a RoI head's regions, this is ``kd_loss``: a mean over positions.
    For dense heads, a sigmoid for each class, no formula is official. ``binary_kd_loss``, a sum divided by the
    teacher's own count of foreground anchors, is a reading; it needs no labels, and works with one class.

    Published for segmentation: alpha 1, temperature 1 (CIRKD). For detectors nothing is; the same is a reading. For
    the classification of images the temperature is 4 on CIFAR, 1 on ImageNet.

    Args:
        student, teacher: the levels to distil.
        alpha: weight.
        temperature: T, by which logits are divided; the loss is multiplied by its square.
    """

    reads = (LOGITS, CLASSES)

    def __init__(self, student: Pyramid, teacher: Pyramid, *, alpha: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__(student, teacher)
        check_weights(alpha=alpha)
        check_temperature(temperature)
        self.alpha, self.temperature = alpha, temperature
        self.sigmoid = {level: spec.sigmoid for level, spec in student.items()}
        self._metrics: dict[str, Tensor] = {}

    def forward(self, student: Features, teacher: Features, targets: Targets = NOTHING_KNOWN) -> dict[str, Tensor]:
        """Return ``loss_kd_kl``."""
        losses, self._metrics = [], {}
        for level in self.levels:
            own, other = student[level], teacher[level].detach()
            loss = binary_kd_loss if self.sigmoid[level] else kd_loss
            losses.append(loss(own, other, self.temperature))
            if own.numel():
                self._metrics[f"{level}/agreement"] = _agreement(own.detach(), other, self.sigmoid[level])
        return {"loss_kd_kl": self.alpha * sum(losses)}  # type: ignore[dict-item]

    def metrics(self) -> dict[str, Tensor]:
        """Return ``<level>/agreement``, the share of positions at which both prefer the same class.

        On sigmoid heads a position counts as much as the teacher's largest probability there.
        """
        return dict(self._metrics)


def _agreement(student: Tensor, teacher: Tensor, sigmoid: bool) -> Tensor:
    same = (student.argmax(1) == teacher.argmax(1)).float()
    if not sigmoid:
        return same.mean()
    weight = teacher.float().amax(1).sigmoid()
    return (weight * same).sum() / weight.sum().clamp_min(1e-12)
