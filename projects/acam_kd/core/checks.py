"""Checks of what only a training step shows, so that nothing that was asked for is dropped in silence."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .distiller import Distiller, method_arguments
from .errors import ConfigError, Names, names_of, rendered
from .features import CLASSES, Features, Pyramid
from .targets import Targets

__all__ = [
    "OptimizerWatch",
    "check_channels",
    "check_gradients",
    "check_pair",
    "check_targets",
    "frozen_levels",
    "frozen_warning",
    "warnings_of",
    "watched",
]


def check_channels(role: str, level: str, features: Tensor, declared: int) -> None:
    """Raise ConfigError for a map with other channels than the model declares."""
    if features.shape[1] != declared:
        raise ConfigError(
            role, f"{features.shape[1]} channels at level {level}", f"the {declared} that it declares",
            "its output_shape and its maps differ",
        )  # fmt: skip


def check_pair(student: Features, teacher: Features, levels: Mapping[str, str], shapes: Mapping[str, Pyramid]) -> None:
    """Check the maps of one batch against each other and against the declared channels.

    Args:
        student, teacher: maps under the student's level names.
        levels: student's level name -> teacher's level name.
        shapes: ``"student"`` and ``"teacher"`` -> that model's own level name -> the declared shape.

    Raises:
        ConfigError: names the level and a remedy.
    """
    for level, of_teacher in levels.items():
        s, t = student[level], teacher[level]
        for role, name, features in (("student", level, s), ("teacher", of_teacher, t)):
            check_channels(role, name, features, shapes[role][name].channels)
        if s.shape[0] != t.shape[0]:
            raise ConfigError(
                "student", f"{s.shape[0]} maps at level {level}", f"{t.shape[0]}, one for each image of the batch",
                f"leave {level} out of {{levels}}, or tap a part that sees each image once",
            )  # fmt: skip
        if s.shape[2:] != t.shape[2:]:
            sizes = [" x ".join(map(str, x.shape[2:])) for x in (t, s)]
            if level == CLASSES:
                hint = "the two heads must predict for the same anchors; see {method}"
            else:
                hint = (
                    "its strides are not what it claims, or the batch is padded otherwise than it needs; leave "
                    f"{level} out of {{levels}}, or choose a teacher whose backbone is like the student's"
                )
            raise ConfigError(
                "teacher",
                f"{sizes[0]} positions at level {of_teacher}",
                f"the {sizes[1]} of the student's {level}",
                hint,
            )


def frozen_levels(student: Features, method: Distiller) -> list[str]:
    """List the levels that carry no gradient to the student, and raise if a method has no other.

    Raises:
        ConfigError: nothing of one method would reach the student.
    """
    for part in method.parts():
        if not any(student[level].requires_grad for level in part.levels):
            raise ConfigError(
                "student", f"no gradient at {', '.join(part.levels)}", f"one, for {type(part).__name__} to train",
                "is that part frozen, under no_grad, or checkpointed with use_reentrant=True (use False)? Else choose "
                "other {levels}",
            )  # fmt: skip
    return [level for level in method.levels if not student[level].requires_grad]


def frozen_warning(levels: list[str]) -> str:
    """Return the warning about levels that carry no gradient."""
    return (
        f"no gradient reaches the student at {', '.join(levels)}: leave these levels out, if that part is frozen; or "
        "checkpoint it with use_reentrant=False"
    )


def check_gradients(part: Distiller, student: Features, losses: Mapping[str, Tensor]) -> None:
    """Check that a method's losses depend on the student; called in the first step only.

    Raises:
        ConfigError: they do not.
    """
    inputs = [student[level] for level in part.levels if student[level].requires_grad]
    total = [loss for loss in losses.values() if loss.requires_grad]
    name = type(part).__name__
    gradients: Iterable[Tensor | None] = ()
    if total and inputs:
        gradients = torch.autograd.grad(
            torch.stack([x.float() for x in total]).sum(), inputs, retain_graph=True, allow_unused=True
        )
    if all(gradient is None for gradient in gradients):
        raise ConfigError(
            "method",
            f"{name}, none of whose losses depends on the student",
            "a loss with a gradient into the student",
            "does it detach the student's features?",
        )


def check_targets(method: Distiller, targets: Targets, student: Pyramid) -> None:
    """Check that the annotations are there that methods need.

    Args:
        method: may consist of several.
        targets: what is known of the batch.
        student: the levels; only those that are predictions have labels.

    Raises:
        ConfigError: they are not.
    """
    for part in method.parts():
        name = type(part).__name__
        hint = f"{name} needs them: give {{targets}}, or choose a method that needs none, such as MGD or PKD"
        if "boxes" in part.needs and (targets.boxes is None or targets.image_sizes is None):
            raise ConfigError("targets", "no boxes", "the boxes of every image in training", hint)
        if "boxes" in part.needs and targets.boxes is not None and targets.boxes.shape[-1] != 4:
            raise ConfigError(
                "targets",
                f"boxes of {targets.boxes.shape[-1]} numbers",
                "axis-aligned boxes of 4: x0, y0, x1, y1",
                hint,
            )
        missing = [level for level in part.levels if student[level].logits and level not in targets.labels]
        if "labels" in part.needs and missing:
            raise ConfigError("targets", f"no labels for {', '.join(missing)}", "a label for every position", hint)


def warnings_of(method: Distiller, names: Names) -> dict[str, str]:
    """Return the problems of a method's last step: method and place -> a sentence in a front end's words."""
    texts: dict[str, str] = {}
    for part in method.parts():
        name = type(part).__name__
        theirs = names_of(name, method_arguments(type(part)), names)
        texts.update({f"{name}/{place}": rendered(text, theirs) for place, text in part.warnings().items()})
    return texts


class OptimizerWatch:
    """Looks, at the steps of all optimizers, whether one that trains the student has the method's parameters.

    It goes by membership, not by movement, so a warm-up at learning rate 0 and accumulation are no reason to warn.

    Args:
        student: has the parameters that are trained.
        method: its own parameters should be too.
    """

    def __init__(self, student: nn.Module, method: nn.Module) -> None:
        theirs = {id(p) for p in method.parameters() if p.requires_grad}
        self._method = theirs
        self._student = {id(p) for p in student.parameters() if p.requires_grad} - theirs
        self.trained = not theirs
        self.steps = 0
        this = weakref.ref(self)

        def look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            watch = this()
            if watch is not None:
                watch._look(optimizer)

        self._handle = register_optimizer_step_pre_hook(look)

    def _look(self, optimizer: torch.optim.Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._method -= held
        self.trained = not self._method
        self.steps += bool(held & self._student)

    @property
    def forgotten(self) -> bool:
        """Two steps have trained the student, and parameters of the method are in no optimizer."""
        return not self.trained and self.steps >= 2

    def remove(self) -> None:
        """Stop looking."""
        self._handle.remove()


def watched(
    watch: OptimizerWatch | None, student: nn.Module, method: nn.Module, warn: Callable[[str, str], None]
) -> OptimizerWatch | None:
    """Return the watch of a step that begins; start one for a method with parameters, end one that has seen enough.

    Args:
        watch: of the step before.
        student, method: see ``OptimizerWatch``.
        warn: called with a place and a sentence if the method's parameters are in no optimizer.
    """
    if watch is None:
        return OptimizerWatch(student, method) if any(p.requires_grad for p in method.parameters()) else None
    if watch.trained or watch.forgotten:
        watch.remove()  # it looks at every parameter at every step
    if watch.forgotten:
        warn(
            "optimizer", "the method's parameters are in no optimizer that trains the student: they stay at their "
            "random start. Build the optimizer from student.parameters(), or add student.distillation.parameters()",
        )  # fmt: skip
    return watch
