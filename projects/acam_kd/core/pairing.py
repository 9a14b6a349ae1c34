"""Features and annotations of one batch, brought to the student's levels and sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from torch import Tensor
from torch.nn import functional as F

from .class_head import Predictions
from .classes import CommonClasses
from .errors import ConfigError
from .features import CLASSES, LOGITS, Features, Pyramid, near
from .targets import Targets

__all__ = ["paired", "resized_levels", "sized_targets"]


def paired(
    student: Features,
    teacher: Features,
    levels: Mapping[str, str],
    classes: Mapping[str, CommonClasses],
    *,
    cast: bool = False,
    resized: Collection[str] = (),
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return both models' maps under the student's level names, predictions reduced to the common classes.

    The teacher's map of logits is resized to the student's size, bilinearly with corners aligned: output strides may
    differ.

    Args:
        student, teacher: level -> map, each with its own level names.
        levels: student's level name -> teacher's level name.
        classes: student's level name -> its common classes, where not all are.
        cast: the teacher's maps get the student's data type.
        resized: the levels of which the finer map is resized to the coarser one's grid, bilinearly.
    """
    of_student = {s: student[s] for s in levels}
    of_teacher = {s: teacher[t] for s, t in levels.items()}
    for level, common in classes.items():
        if level in levels:
            of_student[level] = common.of_student(of_student[level], level)
            of_teacher[level] = common.of_teacher(of_teacher[level], levels[level])
    if LOGITS in levels:
        of_teacher[LOGITS] = _resized(of_teacher[LOGITS], of_student[LOGITS])
    for level in resized:
        if level in levels:
            of_student[level], of_teacher[level] = _on_one_grid(of_student[level], of_teacher[level])
    if cast:
        of_teacher = {s: x.to(of_student[s].dtype) for s, x in of_teacher.items()}
    return of_student, of_teacher


def resized_levels(levels: Mapping[str, str], shapes: Mapping[str, Pyramid]) -> list[str]:
    """List the student's levels whose partner has a near stride, as patches of 14 pixels beside a stride of 16.

    Args:
        levels: student's level name -> teacher's level name.
        shapes: ``"student"`` and ``"teacher"`` -> level -> its declared shape.
    """
    return [s for s, t in levels.items() if near(shapes["student"][s], shapes["teacher"][t])]


def sized_targets(
    targets: Targets, student: Features, predictions: Predictions | None, classes: Mapping[str, CommonClasses]
) -> Targets:
    """Return targets whose labels belong to the student's maps, numbered as the common classes.

    Args:
        targets: as the engine has them; labels of pixels at the size of the batch.
        student: the levels that are distilled.
        predictions: of the class head, whose labels are added.
        classes: level -> its common classes, where not all are.
    """
    labels = dict(targets.labels)
    if LOGITS in student and LOGITS in labels:
        labels[LOGITS] = _labels_at(labels[LOGITS], student[LOGITS])
    else:  # of a map that is not distilled
        labels.pop(LOGITS, None)
    if predictions is not None and predictions.labels is not None:
        labels[CLASSES] = predictions.labels
    labels = {level: classes[level].labels(x) if level in classes else x for level, x in labels.items()}
    return dataclasses.replace(targets, labels=labels)


def _resized(logits: Tensor, like: Tensor) -> Tensor:
    if logits.shape[2:] == like.shape[2:]:
        return logits
    return F.interpolate(logits, like.shape[2:], mode="bilinear", align_corners=True)


def _on_one_grid(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    size = [min(sides) for sides in zip(student.shape[2:], teacher.shape[2:])]
    one, two = (
        x if list(x.shape[2:]) == size else F.interpolate(x.float(), size, mode="bilinear", antialias=True).to(x.dtype)
        for x in (student, teacher)
    )
    return one, two


def _labels_at(labels: Tensor, logits: Tensor) -> Tensor:
    """(N, H', W') labels for the positions of (N, K, H, W) logits: those nearest to the cells' centres.

    Where a head is scaled up with corners aligned, as Detectron2's are here, its outermost positions lie on the border
    itself: up to half a cell from there.
    """
    if labels.dim() == 1:  # one for each image
        labels = labels[:, None, None]
    if labels.dim() != 3 or len(labels) != len(logits):
        raise ConfigError(
            "targets", f"labels {tuple(labels.shape)} for logits {tuple(logits.shape)}", "(N, H, W) or (N,)"
        )
    if labels.shape[1:] == logits.shape[2:]:
        return labels
    return F.interpolate(labels[:, None].float(), logits.shape[2:], mode="nearest-exact")[:, 0].long()
