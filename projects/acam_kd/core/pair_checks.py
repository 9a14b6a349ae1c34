"""Checks of a student and a teacher that need no training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .adapter import Adapter
from .distiller import Distiller
from .errors import ConfigError
from .features import CLASSES, Pyramid, near
from .scores import SCORES

__all__ = ["check_annotations", "check_class_heads", "check_models", "check_names"]


def check_models(student: Any, teacher: Any, *, alone: bool = False) -> None:
    """Raise ConfigError for a student or a teacher that cannot be one.

    Args:
        student, teacher: the two models.
        alone: there is no teacher.
    """
    for role, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module):
            raise ConfigError(role, type(model).__name__, "an nn.Module", "build it first, and load its weights")
    if isinstance(student, torch.jit.ScriptModule):
        raise ConfigError("student", type(student).__name__, "an nn.Module in Python", "attach before scripting")
    for wrapper in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule"):
        if any(cls.__name__ == wrapper for cls in type(student).__mro__):
            raise ConfigError("student", wrapper, "the model inside of it", "attach the distillation, then wrap")
    if alone:
        return
    if teacher is student:
        raise ConfigError("teacher", "the student itself", "another model, as copy.deepcopy(student)")
    trained = {id(p) for p in student.parameters() if p.requires_grad}
    if any(id(p) in trained for p in teacher.parameters()):
        raise ConfigError(
            "teacher", "parameters that the student trains", "a model with parameters of its own",
            "copy.deepcopy what the two share",
        )  # fmt: skip


def check_names(shapes: Mapping[str, Pyramid]) -> None:
    """Raise ConfigError for levels that both sides call by one name and whose strides are too different to resize."""
    for name, spec in shapes["student"].items():
        other = shapes["teacher"].get(name, spec)
        resized = near(spec, other) or (spec.logits and other.logits)
        if other.stride != spec.stride and not resized:
            raise ConfigError(
                "teacher_levels", f"{name} of stride {other.stride}", f"the student's stride, {spec.stride}",
                "choose parts of one stride, or give them different names",
            )  # fmt: skip


def check_annotations(student: Adapter, method: Distiller) -> None:
    """Raise ConfigError for a method that needs annotations which the student is trained without."""
    for part in method.parts():
        missing = [need for need in part.needs if need not in (*student.annotations, SCORES)]
        if missing and not (missing == ["labels"] and all(level == CLASSES for level in part.levels)):
            raise ConfigError(
                "method", type(part).__name__, f"one that needs no {' and '.join(missing)}",
                f"a {student.name} is trained without any",
            )  # fmt: skip


def check_class_heads(student: Adapter, teacher: Adapter) -> None:
    """Raise ConfigError for class heads that predict for other places, or by other means."""
    anchors = student.anchors(), teacher.anchors()
    names = f"a {teacher.name}", f"like the student's, a {student.name}'s"
    if (anchors[0] is None) != (anchors[1] is None):
        raise ConfigError(
            "teacher",
            f"{names[0]}, which predicts {'regions' if anchors[1] is None else 'anchors'}",
            f"a class head {names[1]}",
            "see {method}",
        )
    if type(student) is not type(teacher):
        raise ConfigError("teacher", f"{names[0]} of another framework", "class heads of one framework", "see {method}")
    if student.box_dimension != teacher.box_dimension:
        raise ConfigError(
            "teacher",
            f"boxes of {teacher.box_dimension} numbers",
            f"the student's {student.box_dimension}",
            "rotated and axis-aligned regions do not correspond",
        )
    if anchors[0] is not None and anchors[1] is not None and not _same(anchors[0], anchors[1]):
        raise ConfigError(
            "teacher",
            f"{names[0]} with other anchors",
            f"anchors {names[1]}",
            "classes of other anchors do not correspond; see {method}",
        )


def _same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    """Compare anchors up to the rounding of a config file."""
    if len(a) != len(b):
        return False
    return all(
        x.shape == y.shape and (x.is_meta or torch.allclose(x.cpu(), y.cpu(), rtol=0, atol=0.1)) for x, y in zip(a, b)
    )
