"""USKD: soft labels that a student makes of its own predictions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.distiller import NOTHING_KNOWN, Distiller, check_weights
from ..core.errors import ConfigError
from ..core.features import BACKBONE, CLASSES, Channels, Features
from ..core.registry import DISTILLER_REGISTRY
from ..core.targets import Targets
from .parts.logits import check_several_classes
from .parts.losses import full_precision
from .recipes import RECIPES

__all__ = ["FORMS", "USKD", "SoftLabels", "nontarget_loss", "rank_score", "soft_labels", "target_loss", "zipf"]

FORMS = ("released", "symmetric")
"""The score by which classes are ranked adds the weak head's probability and, as in the released code, the logarithm of
the final one; or, as the paper's text has it, the final probability."""
EPS = 1e-6
SMOOTHING = 0.1


@dataclass(frozen=True)
class SoftLabels:
    """The classes of a batch that count as targets.

    Args:
        classes: (N, L) int64, one column, or two where labels are mixed.
        values: (N, L), their weights; a class of weight 0 is no target.
    """

    classes: Tensor
    values: Tensor

    def present(self, num_classes: int) -> Tensor:
        """Return (N, K), True at the targets."""
        found = torch.zeros(len(self.classes), num_classes, device=self.classes.device)
        return found.scatter_add(1, self.classes, (self.values > 0).float()) > 0


def soft_labels(labels: Tensor) -> SoftLabels:
    """Return the targets of hard labels (N,), or the two largest entries of mixed ones, (N, K)."""
    if labels.dim() == 1:
        return SoftLabels(labels[:, None], torch.ones(len(labels), 1, device=labels.device))
    values, classes = labels.sort(dim=1, descending=True, stable=True)
    return SoftLabels(classes[:, :2], values[:, :2])


@full_precision
def target_loss(logits: Tensor, labels: SoftLabels) -> Tensor:
    r"""Compute the cross-entropy with the soft target label.

    .. math:: L_t = - \mathrm{mean}_n \sum_l t_{nl} \log p_n(Y_l), \quad t_l = p(Y_l)^2 + v_l - \mathrm{mean}_n p(Y_l)^2

    t is a constant, and 0 where v is. Its mean is over the batch, so of a single image the loss is the cross-entropy.

    Args:
        logits: (N, K).
        labels: N targets Y with values v.
    """
    log_p = logits.log_softmax(1).gather(1, labels.classes)
    square = log_p.detach().exp().square()
    soft = (square + labels.values - square.mean(0)).where(labels.values > 0, torch.zeros_like(square))
    return -(soft * log_p).sum() / max(len(logits), 1)


@full_precision
def rank_score(logits: Tensor, weak: Tensor, labels: SoftLabels, form: str = "released") -> Tensor:
    r"""Return the scores (N, K) by which classes are ranked, without a graph.

    .. math:: r_k = \frac{w_k}{1 - \sum_l w(Y_l) + 10^{-6}} + \frac{s_k}{1 - \sum_l s(Y_l) + 10^{-6}}

    Args:
        logits, weak: (N, K), of the network and of the weak head, whose softmax is w.
        labels: the targets Y.
        form: ``"released"``, where s is the logarithm of the network's probabilities, or ``"symmetric"``, where s is
            the probabilities themselves.
    """
    present = labels.present(logits.shape[1])
    w = weak.detach().softmax(1)
    s = logits.detach().log_softmax(1) if form == "released" else logits.detach().softmax(1)
    parts = [x / (1 - (x * present).sum(1, keepdim=True) + EPS) for x in (w, s)]
    return parts[0] + parts[1]


def zipf(score: Tensor, present: Tensor) -> Tensor:
    """Return Zipf's distribution over the classes that are no targets, (N, K): 1 / rank, divided by its sum.

    Rank 1 has the largest score. All classes are ranked, targets too. Of equal scores the first class comes first.
    """
    order = score.argsort(dim=1, descending=True, stable=True)
    numbers = torch.arange(1, score.shape[1] + 1, device=score.device)
    rank = torch.empty_like(order).scatter_(1, order, numbers.expand_as(order))
    share = (1 / rank.float()).masked_fill(present, 0)
    return share / share.sum(1, keepdim=True).clamp_min(1e-12)


@full_precision
def nontarget_loss(logits: Tensor, soft: Tensor, present: Tensor) -> Tensor:
    r"""Compute the cross-entropy among the classes that are no targets.

    .. math:: L_n = - \mathrm{mean}_n \sum_{k \notin Y} \zeta_k \log \mathrm{softmax}_{k \notin Y}(z)_k

    Args:
        logits: (N, K).
        soft: (N, K), the distribution zeta.
        present: (N, K), True at the targets.
    """
    log_p = logits.masked_fill(present, float("-inf")).log_softmax(1)
    return -(soft * log_p.masked_fill(present, 0)).sum() / max(len(logits), 1)


@DISTILLER_REGISTRY.register()
class USKD(Distiller):
    """Universal self-distillation of classifiers: L = alpha * L_target + beta * L_nontarget + mu * L_weak.

    Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss
    and Customized Soft Labels", ICCV 2023; there is no teacher. The probability of the target makes a soft target
    label, ``target_loss``. Zipf's distribution over the ranks of the other classes is their soft label,
    ``nontarget_loss``; the ranks are those of ``rank_score``. A weak head, one linear layer on the mean over positions
    of the second-last stage, is trained on smoothed labels by L_weak. Its gradient reaches the stage.

    The losses are added to the task's cross-entropy. Published: 1, 0.1 and 0.005 on ImageNet; 0.1, 0.1 and 0.1 on
    CIFAR-100. A label whose value is 0 is no target here; the released code takes it for one.

    Args:
        student_channels, teacher_channels: one stage, and ``classes``, the logits.
        alpha: weight of L_target.
        beta: weight of L_nontarget.
        mu: weight of L_weak.
        form: one of ``FORMS``.

    Raises:
        ConfigError: a weight is out of range, the form is unknown, or the levels are not one stage and the logits.

    Example:
        >>> from acam_kd import Targets
        >>> method = USKD({"c4": 8, "classes": 10}, {"c4": 8, "classes": 10})
        >>> maps = {"c4": torch.rand(4, 8, 3, 3), "classes": torch.rand(4, 10, 1, 1)}
        >>> losses = method(maps, maps, Targets(labels={"classes": torch.randint(10, (4, 1, 1))}))
        >>> sorted(losses)
        ['loss_uskd_nontarget', 'loss_uskd_target', 'loss_uskd_weak']
    """

    reads = (BACKBONE, CLASSES)
    needs = ("labels",)
    families = ("classifier", "small_classifier", "")
    teacherless = True
    recipes = RECIPES["USKD"]

    def __init__(
        self,
        student_channels: Channels,
        teacher_channels: Channels,
        *,
        alpha: float = 1.0,
        beta: float = 0.1,
        mu: float = 0.005,
        form: str = "released",
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        check_weights(alpha=alpha, beta=beta, mu=mu)
        if form not in FORMS:
            raise ConfigError("form", form, f"one of {', '.join(FORMS)}")
        stages = [level for level, spec in self.student_levels.items() if not spec.logits]
        logits = [level for level, spec in self.student_levels.items() if spec.logits and not spec.sigmoid]
        if len(stages) != 1 or len(logits) != 1:
            raise ConfigError(
                "levels", ", ".join(self.levels), "one stage and the logits of a classifier, as c4, classes"
            )
        self.stage, self.logits = stages[0], logits[0]
        check_several_classes({self.logits: self.student_levels[self.logits]}, method="USKD")
        self.alpha, self.beta, self.mu, self.form = alpha, beta, mu, form
        channels = self.student_levels[self.stage].channels
        self.weak_head = nn.Linear(channels, self.student_levels[self.logits].channels)

    def title(self) -> str:
        """Return the method's name and its form."""
        return f"USKD, {self.form} rank score"

    def forward(self, student: Features, teacher: Features, targets: Targets = NOTHING_KNOWN) -> dict[str, Tensor]:
        """Return ``loss_uskd_target``, ``loss_uskd_nontarget`` and ``loss_uskd_weak``."""
        logits = student[self.logits].flatten(1)
        if self.logits not in targets.labels:
            raise ConfigError("targets", "no labels", f"the label of every image for {self.logits}")
        known = targets.labels[self.logits]
        if known.numel() != len(logits):
            raise ConfigError("targets", f"labels {tuple(known.shape)}", f"{len(logits)}, one for each image")
        labels = soft_labels(known.flatten())
        weak = self.weak_head(student[self.stage].mean((2, 3)))
        present = labels.present(logits.shape[1])
        soft = zipf(rank_score(logits, weak, labels, self.form), present)
        self._step = {
            f"{self.logits}/target": logits.detach().float().softmax(1).gather(1, labels.classes).mean(),
            f"{self.stage}/weak_accuracy": (weak.detach().argmax(1) == labels.classes[:, 0]).float().mean(),
        }
        return {
            "loss_uskd_target": self.alpha * target_loss(logits, labels),
            "loss_uskd_nontarget": self.beta * nontarget_loss(logits, soft, present),
            "loss_uskd_weak": self.mu * weak_loss(weak, labels),
        }

    def metrics(self) -> dict[str, Tensor]:
        """Return the mean probability of the target, and the weak head's accuracy on the batch."""
        return dict(self._step)


@full_precision
def weak_loss(weak: Tensor, labels: SoftLabels) -> Tensor:
    """Compute the weak head's cross-entropy with smoothed labels, 0.9 of the label and 0.1 spread over all classes.

    Args:
        weak: logits, (N, K).
        labels: N targets.
    """
    log_w = weak.log_softmax(1)
    hard = (labels.values * log_w.gather(1, labels.classes)).sum(1)
    return -((1 - SMOOTHING) * hard + SMOOTHING * log_w.mean(1)).sum() / max(len(weak), 1)
