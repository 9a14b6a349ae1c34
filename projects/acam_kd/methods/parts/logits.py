"""Helpers of the methods that distil predicted classes: softmax, positions with a label, metrics.

Letters: N images, or regions; K classes, in dimension 1; further dimensions are positions; P positions with a label.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from ...core.errors import ConfigError
from ...core.features import Features, Pyramid
from ...core.targets import Targets

__all__ = [
    "Labelled",
    "agreement",
    "check_several_classes",
    "kl_divergence",
    "labelled_positions",
    "softened",
    "without_target",
]

Labelled = tuple[Tensor, Tensor, Tensor]
"""The student's logits (P, K), the teacher's (P, K), without a graph, and labels (P,) in 0..K-1."""


def softened(logits: Tensor, temperature: float) -> Tensor:
    """Return logits / T, without a copy at T = 1."""
    return logits if temperature == 1 else logits / temperature


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute KL(softmax(teacher) || softmax(student)) over dimension 1: (N, K, ...) -> (N, ...).

    No gap between logits is too large, because no logarithm of a probability is taken. The caller casts to float32.
    """
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True).sum(1)


def without_target(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the K - 1 logits of the other classes: (P, K), (P,) -> (P, K - 1).

    The last class takes the place of the target, and the last place is dropped. So the order of the classes changes,
    in the same way for student and teacher. Nothing has to be masked with a large negative number.
    """
    return logits.scatter(1, labels[:, None], logits[:, -1:])[:, :-1]


def labelled_positions(student: Features, teacher: Features, targets: Targets, *, method: str) -> dict[str, Labelled]:
    """Select, per level, the positions whose label is one of its K classes.

    Positions without a channel for their label are left out. These are ignored positions, and the background of heads
    that predict each class with a sigmoid. A background that is a class of its own counts like any other.

    Args:
        student, teacher: level -> (N, K, ...).
        targets: with labels (N, ...) for each of these levels.
        method: the method's name, for messages.

    Raises:
        ConfigError: a level has no labels, or labels that do not fit the logits.
        ValueError: student and teacher differ in shape.
    """
    selected = {}
    for level, student_logits in student.items():
        if level not in targets.labels:
            known = ", ".join(targets.labels) or "no level"
            raise ConfigError(
                "targets",
                f"labels for {known}",
                f"the label of every position of {level}",
                hint=f"{method} needs it: choose a method that needs none, such as KD, or give {{targets}}",
            )
        teacher_logits, labels = teacher[level].detach(), targets.labels[level]
        if student_logits.shape != teacher_logits.shape:
            raise ValueError(
                f"student {tuple(student_logits.shape)} and teacher {tuple(teacher_logits.shape)} differ in shape at "
                f"level {level}"
            )
        expected = (student_logits.shape[0], *student_logits.shape[2:])
        if labels.shape != expected:
            raise ConfigError(
                "targets",
                f"labels {tuple(labels.shape)} for {level}",
                f"{expected}, one for every position of the logits {tuple(student_logits.shape)}",
            )
        # Positions are selected first: of a dense head's anchors few are left.
        keep = (labels >= 0) & (labels < student_logits.shape[1])
        selected[level] = student_logits.movedim(1, -1)[keep], teacher_logits.movedim(1, -1)[keep], labels[keep]
    return selected


def agreement(compared: Mapping[str, Labelled]) -> dict[str, Tensor]:
    """Return two metrics: the number of compared positions, and the share at which both prefer the same class."""
    metrics = {}
    for level, (student, teacher, labels) in compared.items():
        metrics[f"{level}/positions"] = student.new_tensor(len(labels))
        if len(labels):
            metrics[f"{level}/agreement"] = (student.argmax(1) == teacher.argmax(1)).float().mean()
    return metrics


def check_several_classes(pyramid: Pyramid, *, method: str) -> None:
    """Raise ConfigError for a level with fewer than two classes, over which a softmax is constant."""
    for level, spec in pyramid.items():
        classes = spec.channels - spec.unused
        if classes < 2:
            raise ConfigError(
                "levels",
                f"{level} with {classes} class{'' if classes == 1 else 'es'}",
                "2 classes or more",
                hint=f"{method} tells a class from the others; set {{method}} to KD, which works with one class if it "
                "is predicted by a sigmoid",
            )
