"""MCMI: a teacher is trained further, so that its predictions tell more about the image than the class does."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..core.distiller import NOTHING_KNOWN, Distiller, check_weights
from ..core.errors import ConfigError
from ..core.features import CLASSES, Channels, Features
from ..core.registry import DISTILLER_REGISTRY
from ..core.targets import Targets
from .parts.logits import check_several_classes
from .parts.losses import full_precision
from .recipes import RECIPES

__all__ = ["MCMI", "MODES", "class_centroids", "conditional_mutual_information"]

MODES = ("eval", "train")
"""The modes of the network in which the centroids are taken; the released code leaves it in training mode."""
SMALLEST = 1e-12
"""The smallest probability of a centroid: the logarithm of 0 would be infinite."""


def class_centroids(batches: Iterable[tuple[Tensor, Tensor]], classes: int) -> tuple[Tensor, Tensor]:
    """Return the mean softmax of each class's images, (K, K), and which classes have images, (K,).

    Rows of classes without images are uniform.

    Args:
        batches: logits (N, K) and labels (N,).
        classes: K.
    """
    sums, counts = torch.zeros(classes, classes, dtype=torch.float64), torch.zeros(classes, dtype=torch.float64)
    for logits, labels in batches:
        sums.index_add_(0, labels.cpu(), logits.detach().float().softmax(1).double().cpu())
        counts += torch.bincount(labels.cpu(), minlength=classes)
    present = counts > 0
    sums[~present] = 1
    return (sums / sums.sum(1, keepdim=True)).float(), present


@full_precision
def conditional_mutual_information(logits: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    r"""Compute the mean divergence of predictions from the centroid of their class.

    .. math:: CMI = \mathrm{mean}_n \, KL(p_n \,\Vert\, Q_{y_n})

    Args:
        logits: (N, K), whose softmax is p.
        centroids: Q, (K, K), constants; probabilities below 1e-12 count as 1e-12.
        labels: (N,) int64.
    """
    log_p = logits.log_softmax(1)
    log_q = centroids.detach().clamp_min(SMALLEST).log()[labels]
    return (log_p.exp() * (log_p - log_q)).sum() / max(len(logits), 1)


@DISTILLER_REGISTRY.register()
class MCMI(Distiller):
    """Maximal conditional mutual information: a trained teacher learns on with L = CE - lambda_cmi * CMI.

    Ye et al., "Bayes Conditional Distribution Estimation for Knowledge Distillation Based on Conditional Mutual
    Information", ICLR 2024. The model that is trained is the teacher of later runs, by KD say. There is no other
    teacher. The centroids are taken once, before the first step, on the training images, and then stay.

    The released code takes the centroids in training mode, so that statistics of batch norms move. ``centroids`` is
    ``"eval"`` here by default. The images of this pass are not augmented; those of the released code are.

    Published: lambda 0.15, 0.1 to 0.25 in scripts; 20 epochs of SGD at half the rate of training, 0.05, cosine, batch
    64. With a large lambda the cross-entropy rises: compare ``top1`` before and after. A worse teacher may still teach
    better, so judge it by the student.

    Args:
        student_channels, teacher_channels: ``classes``, the logits.
        lambda_cmi: weight of CMI, which is maximised.
        centroids: one of ``MODES``.

    Raises:
        ConfigError: an argument is out of range, or the level is not the logits of a classifier. In ``forward``: no
            centroids were taken.

    Example:
        >>> from acam_kd import Targets
        >>> method = MCMI({"classes": 3}, {"classes": 3})
        >>> logits, labels = torch.rand(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> _ = method.take_centroids([(logits, labels)])
        >>> maps = {"classes": logits[:, :, None, None]}
        >>> losses = method(maps, maps, Targets(labels={"classes": labels[:, None, None]}))
        >>> bool(losses["loss_mcmi_cmi"] < 0)
        True
    """

    reads = (CLASSES,)
    needs = ("labels",)
    families = ("classifier", "small_classifier", "")
    teacherless = True
    recipes = RECIPES["MCMI"]

    def __init__(
        self,
        student_channels: Channels,
        teacher_channels: Channels,
        *,
        lambda_cmi: float = 0.15,
        centroids: str = "eval",
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        check_weights(lambda_cmi=lambda_cmi)
        if centroids not in MODES:
            raise ConfigError("centroids", centroids, f"one of {', '.join(MODES)}")
        if len(self.levels) != 1 or self.student_levels[self.levels[0]].sigmoid:
            raise ConfigError("levels", ", ".join(self.levels), "the logits of a classifier alone, as classes")
        check_several_classes(self.student_levels, method="MCMI")
        self.lambda_cmi, self.mode, self.logits = lambda_cmi, centroids, self.levels[0]
        classes = self.student_levels[self.logits].channels
        self.table: Tensor
        self.taken: Tensor
        self.register_buffer("table", torch.full((classes, classes), 1 / classes))
        self.register_buffer("taken", torch.tensor(False))

    def take_centroids(self, batches: Iterable[tuple[Tensor, Tensor]]) -> list[int]:
        """Take the centroids, and return the classes without images.

        Args:
            batches: logits (N, K) and labels (N,) of all training images.
        """
        centroids, present = class_centroids(batches, len(self.table))
        self.table.copy_(centroids)
        self.taken.fill_(True)
        return (~present).nonzero()[:, 0].tolist()

    def forward(self, student: Features, teacher: Features, targets: Targets = NOTHING_KNOWN) -> dict[str, Tensor]:
        """Return ``loss_mcmi_cmi``, which is not positive."""
        logits = student[self.logits].flatten(1)
        if self.logits not in targets.labels:
            raise ConfigError("targets", "no labels", f"the label of every image for {self.logits}")
        if not self.taken:
            raise ConfigError(
                "method", "MCMI without centroids", "those of the training images",
                "call student.distillation.method.take_centroids first; acam-kd train does so",
            )  # fmt: skip
        labels = targets.labels[self.logits].flatten()
        information = conditional_mutual_information(logits, self.table, labels)
        self._step = {f"{self.logits}/cmi": information.detach()}
        return {"loss_mcmi_cmi": -self.lambda_cmi * information}

    def metrics(self) -> dict[str, Tensor]:
        """Return the conditional mutual information of the batch."""
        return dict(self._step)
