"""What the methods that distil predicted classes share: softmax, positions with a label, what is measured.

Letters: N images, or regions; K classes, in dimension 1; further dimensions are positions. P positions with a label.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from .features import Features, Pyramid
from .targets import Targets

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
    """Logits / T, without a copy at T = 1."""
    return logits if temperature == 1 else logits / temperature


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) over dimension 1: (N, K, ...) -> (N, ...).

    No gap between logits is too large: no logarithm is taken of a probability. Float32 is the caller's business.
    """
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True).sum(1)


def without_target(logits: Tensor, labels: Tensor) -> Tensor:
    """The K - 1 logits of the other classes: (P, K), (P,) -> (P, K - 1).

    Their order changes, alike in student and teacher: the last class takes the place of the target, and the last
    place is dropped. So nothing has to be masked with a large negative number.
    """
    return logits.scatter(1, labels[:, None], logits[:, -1:])[:, :-1]


def labelled_positions(student: Features, teacher: Features, targets: Targets, *, method: str) -> dict[str, Labelled]:
    """Per level, the positions whose label is one of its K classes.

    Left out is what has no channel: ignored positions, and the background of heads that predict each class with a
    sigmoid. Where the background is a class of its own, it counts like any other.

    Args:
        student, teacher: level -> (N, K, ...).
        targets: with labels (N, ...) for each of these levels.
        method: its name, for messages.

    Raises:
        ValueError: a level has no labels, or they or the teacher's logits do not fit the student's.
    """
    found = {}
    for level, own in student.items():
        if level not in targets.labels:
            known = ", ".join(targets.labels) or "no level"
            raise ValueError(f"{method} needs the label of every position of {level}; there are labels for {known}")
        other, labels = teacher[level].detach(), targets.labels[level]
        if own.shape != other.shape or labels.shape != (own.shape[0], *own.shape[2:]):
            raise ValueError(
                f"level {level}: student {tuple(own.shape)}, teacher {tuple(other.shape)} and labels "
                f"{tuple(labels.shape)} do not fit; (N, K, ...) twice and (N, ...) do"
            )
        # selected first: of a dense head's anchors few are left
        keep = (labels >= 0) & (labels < own.shape[1])
        found[level] = own.movedim(1, -1)[keep], other.movedim(1, -1)[keep], labels[keep]
    return found


def agreement(compared: Mapping[str, Labelled]) -> dict[str, Tensor]:
    """Metrics: how many positions were compared, and at which share of them both prefer the same class."""
    metrics = {}
    for level, (student, teacher, labels) in compared.items():
        metrics[f"{level}/positions"] = student.new_tensor(len(labels))
        if len(labels):
            metrics[f"{level}/agreement"] = (student.argmax(1) == teacher.argmax(1)).float().mean()
    return metrics


def check_several_classes(pyramid: Pyramid, *, method: str) -> None:
    """Raise ValueError for a level with fewer than two classes, over which a softmax is constant."""
    for level, spec in pyramid.items():
        if spec.channels < 2:
            raise ValueError(
                f"{method} tells a class from the others, and {level} has {spec.channels}; KD works with one class, "
                "if it is predicted by a sigmoid (key: DISTILL.METHOD)"
            )
