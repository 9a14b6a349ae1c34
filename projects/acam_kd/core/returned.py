"""The losses of one step: with what the student returned, or waiting for the training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .distiller import Distiller
from .errors import ConfigError, Names, RunError
from .outputs import losses_of, non_finite, with_losses, with_unused

__all__ = ["HIGH", "LONG", "Returned", "lowered", "too_high"]

HIGH, LONG = 10, 100
"""The ratio of the distillation's losses to the task's, and the number of steps above it, that are reported."""


class Returned:
    """The losses of the last step, and their way to the user.

    Attributes:
        losses: name -> 0-d loss; with a graph only where they wait.
        ratio: of the sum of the losses that reach the student to that of the task's, 0-d; None where the student
            returned no losses.
        finite: level -> whether the teacher's features were finite; see ``Compared``.
    """

    def __init__(self) -> None:
        self.losses: dict[str, Tensor] = {}
        self.ratio: Tensor | None = None
        self.finite: dict[str, Tensor] = {}
        self._waiting = False
        self._high: Tensor | None = None
        self._kept: tuple[dict[str, Tensor], bool] | None = None

    def begin(self, *, recomputed: bool) -> None:
        """Forget the last step; but keep its losses where a checkpoint repeats its forward."""
        self._kept = (self.losses, self._waiting) if recomputed else None
        self.losses, self.ratio, self.finite = {}, None, {}

    @property
    def recomputed(self) -> bool:
        """The forward under way is one that a checkpoint repeats in backward."""
        return self._kept is not None

    def restore(self) -> None:
        """Put the losses back that ``begin`` kept."""
        if self._kept is not None:
            (self.losses, self._waiting), self._kept = self._kept, None

    def merge(self, output: Any, losses: dict[str, Tensor] | None, method: Distiller) -> Any:
        """Add the losses to the student's output, or, without any, gradients of zero for the method's parameters.

        Args:
            output: of the student in training.
            losses: those of the distillation; None for a step without one.
            method: has the parameters that need gradients in every step.

        Returns:
            The output with the losses, or None to leave it untouched, and the losses waiting.

        Raises:
            ConfigError: the student has losses of the same names.
        """
        task = losses_of(output)
        if not task:
            unused = {} if losses is not None else with_unused({"loss_unused": _zero(method)}, method)
            self.losses, self._waiting = {**(losses or {}), **unused}, True
            return None
        if clash := sorted(task.keys() & (losses or {}).keys()):
            raise ConfigError("method", f"losses that the student has too: {', '.join(clash)}", "names of its own")
        self.losses, self._waiting = {name: x.detach() for name, x in (losses or {}).items()}, False
        auxiliary = {name for part in method.parts() for name in part.auxiliary}
        if reaching := {name: x for name, x in (losses or {}).items() if name not in auxiliary}:
            trained = {name: x for name, x in task.items() if x.requires_grad} or task  # others only inform, as errors
            sums = (torch.stack([x.detach().float() for x in part.values()]).sum() for part in (reaching, trained))
            own, others = sums
            self.ratio = own / others
            self._high = torch.where(self.ratio > HIGH, self._high + 1, 0) if self._high is not None else 0 * own
        return with_losses(output, with_unused(task, method) if losses is None else {**task, **losses})

    def read(self) -> dict[str, Tensor]:
        """Return the losses; they wait no longer."""
        self._waiting = False
        return dict(self.losses)

    def check_read(self) -> None:
        """Raise ConfigError for losses of the last step that wait and that nobody read; once a step."""
        if self._waiting:
            self._waiting = False
            raise ConfigError(
                "student", "an output that cannot carry the losses of the last step, which nobody used",
                "a dict of losses, or a training loop that adds them",
                "after every forward write: loss = criterion(student(images), labels) + "
                "sum(student.distillation.losses.values())",
            )  # fmt: skip

    def check_finite(
        self, output: Any, when: str, *, precision: str, metrics: Callable[[], Mapping[str, Tensor]]
    ) -> None:
        """Raise RunError for losses, or features of a teacher, that are not finite.

        Args:
            output: the student's, with the losses; one without losses is not looked at.
            when: said in the message.
            precision: the teacher's.
            metrics: returns the figures of the step; those that are not finite are named.
        """
        of_teacher = [*self.finite.values()]
        finite = torch.stack(of_teacher).tolist() if of_teacher else []  # the device is asked once
        if broken := [level for level, ok in zip(self.finite, finite) if not ok]:
            raise RunError(
                f"the teacher's features, made in {precision}, are not finite: {', '.join(broken)}", when,
                "float16, be it the student's, ends at 65504; see {teacher_precision}",
            )  # fmt: skip
        terms = non_finite(losses_of(output))
        if terms:
            places = [name for name, value in metrics().items() if not math.isfinite(value)]
            where = f" (not finite there: {', '.join(places)})" if places else ""
            raise RunError(
                f"loss is not finite: {', '.join(terms)}{where}", when, "lower the learning rate or the method's weight"
            )

    @property
    def too_high(self) -> bool:
        """The ratio has been above ``HIGH`` for ``LONG`` steps."""
        return self._high is not None and int(self._high) >= LONG

    def __getstate__(self) -> dict[str, Any]:
        """Leave everything out of copies and pickles: it belongs to a step."""
        return vars(Returned())


def too_high(method: Distiller, names: Names) -> str:
    """Return the warning about losses that have been too high, with the front end's names of arguments."""
    return (
        f"the distillation's losses have been more than {HIGH} times the task's for {LONG} steps: "
        f"{lowered(method, names)}"
    )


def lowered(method: Distiller, names: Names) -> str:
    """Return what to do about losses that are too high."""
    return f"lower {names(f'{type(method.parts()[0]).__name__}.alpha')}, or set {names('weight')} to share"


def _zero(module: nn.Module) -> Tensor:
    parameter = next(module.parameters(), None)
    return torch.zeros((), device=parameter.device if parameter is not None else None)
