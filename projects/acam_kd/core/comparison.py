"""One comparison: the teacher on the student's batch, and the method on both models' features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .checks import check_gradients, check_pair, check_targets, frozen_levels
from .classes import CommonClasses
from .distiller import Distiller
from .errors import ConfigError, first_line
from .features import Features, Pyramid
from .pairing import paired, resized_levels, sized_targets
from .reader import Step
from .scores import with_scores
from .taps import restore_autocast
from .targets import Targets
from .teacher import FrozenTeacher, NoTeacher

__all__ = ["Compared", "Comparison"]


@dataclass
class Compared:
    """The result of a comparison.

    Args:
        losses: the method's, 0-d, with graphs.
        frozen: the levels that carry no gradient to the student.
        finite: level -> whether the teacher's features are finite; empty unless its precision was chosen.
    """

    losses: dict[str, Tensor]
    frozen: list[str] = field(default_factory=list)
    finite: dict[str, Tensor] = field(default_factory=dict)


class Comparison:
    """The levels and classes at which a student is compared with its teacher.

    Args:
        levels, shapes, classes: see ``Distillation``.
    """

    def __init__(
        self, levels: Mapping[str, str], shapes: Mapping[str, Pyramid], classes: Mapping[str, CommonClasses]
    ) -> None:
        self.levels, self.shapes, self.classes = levels, shapes, classes
        self.resized = resized_levels(levels, shapes)
        self._taken: tuple[int, ...] | None = None  # by the teacher: channels and sides of a batch
        self._gradients_checked = False

    def run(
        self, teacher: FrozenTeacher, method: Distiller, step: Step, read_targets: Callable[[], Targets]
    ) -> Compared:
        """Run teacher and method on a recorded step.

        Args:
            teacher, method: called once each.
            step: the student's.
            read_targets: returns the annotations.

        Raises:
            ConfigError: the maps of the two do not fit, or something that the method needs is missing.
        """
        with restore_autocast(step.call):
            regions = () if step.predictions is None else (step.predictions.regions,)
            cast = bool(teacher.precision) or not step.call.autocast[2]  # autocast looks after types itself
            answered: Features = {s: x.detach() for s, x in step.features.items()}
            if not isinstance(teacher, NoTeacher):
                answered = self._ask(teacher, step.batch, *regions)
            of_student, of_teacher = paired(
                step.features, answered, self.levels, self.classes, cast=cast, resized=self.resized
            )
            check_pair(of_student, of_teacher, self.levels, self.shapes)
            frozen = frozen_levels(of_student, method)
            finite = {s: x.isfinite().all() for s, x in of_teacher.items()} if teacher.precision else {}
            targets = read_targets()
            if not isinstance(targets, Targets):
                raise ConfigError("targets", f"a function that returns {type(targets).__name__}", "acam_kd.Targets")
            targets = sized_targets(targets, of_student, step.predictions, self.classes)
            targets = with_scores(targets, answered, self.levels)
            check_targets(method, targets, self.shapes["student"])
            losses = self._losses(method, of_student, of_teacher, targets)
        for name, loss in losses.items():
            if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
                shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise ConfigError("method", f"{name}: {shape}", "losses that are 0-d floating-point tensors")
        return Compared(losses, frozen, finite)

    def masks(
        self, teacher: FrozenTeacher, parts: Sequence[Distiller], student: Features, batch: Tensor
    ) -> dict[str, dict[str, Tensor]]:
        """Return the masks of the first method that makes some for a batch, as ``Distiller.masks``.

        Args:
            teacher: called once.
            parts: methods that need no annotations.
            student: the student's maps, which may lack levels.
            batch: (N, C, H, W).
        """
        levels = {s: t for s, t in self.levels.items() if s in student}
        student, of_teacher = paired(student, teacher(batch), levels, self.classes, cast=True, resized=self.resized)
        for part in parts:
            if all(level in student for level in part.levels):
                part(student, of_teacher)
                if masks := part.masks():
                    return masks
        return {}

    def _losses(self, method: Distiller, student: Features, teacher: Features, targets: Targets) -> dict[str, Tensor]:
        """Call the method; the first time, check that each part of it trains the student."""
        parts = [] if self._gradients_checked else method.parts()
        handles = [part.register_forward_hook(_check) for part in parts]
        try:
            losses = dict(method(student, teacher, targets))
        finally:
            for handle in handles:
                handle.remove()
        self._gradients_checked = True
        return losses

    def _ask(self, teacher: FrozenTeacher, batch: Tensor, *regions: Any) -> Features:
        """Ask the teacher, and name the batch if the teacher cannot take it."""
        try:
            features = teacher(batch, *regions)
        except (RuntimeError, AssertionError) as error:
            if isinstance(error, torch.OutOfMemoryError) or batch.shape[1:] == self._taken:
                raise
            reason = first_line(error)
            raise ConfigError(
                "teacher", f"a failure on the student's batch {tuple(batch.shape)}: {reason[:200]}",
                "a teacher that takes it",
                "does it need other padding (sides that are multiples of 32, say) or other channels? Choose a teacher "
                "whose backbone is like the student's, or images, or crops, of such sides; a network of timm takes "
                "all sizes with dynamic_img_size=True",
            ) from error  # fmt: skip
        self._taken = batch.shape[1:]
        return features


def _check(part: Distiller, args: tuple[Any, ...], losses: Mapping[str, Tensor]) -> None:
    check_gradients(part, args[0], losses)
