"""The student's side of a step: what its taps recorded, as named maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .class_head import ClassHead, Predictions
from .errors import ConfigError
from .features import CLASSES
from .taps import Call, Tap

__all__ = ["Convert", "Reader", "Step", "as_mapping", "first_batch", "named"]

Convert = Callable[[Any, Tensor], Mapping[str, Tensor]]
"""The output of a tapped part and the batch -> level name -> (N, C, H, W)."""


def first_batch(values: Sequence[Any]) -> Tensor | None:
    """Return the first batch of images, a tensor of four dimensions, among the arguments of a call."""
    return next((x for x in values if isinstance(x, Tensor) and x.dim() == 4), None)


def as_mapping(output: Any, batch: Tensor) -> Mapping[str, Tensor]:
    """Return the maps of a backbone that returns them by name.

    Raises:
        ConfigError: it returns something else.
    """
    if not isinstance(output, Mapping):
        raise ConfigError(
            "student", f"a {type(output).__name__} from its backbone", "a mapping from level name to feature map",
            "name the levels by the paths of submodules: student_levels={'c4': 'layer3'}",
        )  # fmt: skip
    return output


@dataclass(frozen=True)
class named:  # noqa: N801  # a partial that can be pickled and compared
    """Gives a single map its level's name."""

    level: str

    def __call__(self, output: Any, batch: Tensor) -> Mapping[str, Tensor]:
        """Return the map under its name."""
        return {self.level: output}


@dataclass
class Step:
    """One recorded training forward of the student.

    Args:
        batch: (N, C, H, W), what the teacher gets too.
        features: level -> the student's map.
        predictions: of its class head, if that is distilled.
        call: of the first tapped part, for autocast.
    """

    batch: Tensor
    features: dict[str, Tensor]
    predictions: Predictions | None
    call: Call


@dataclass
class Reader:
    """All taps of one student.

    Args:
        parts: taps, and how each output becomes named maps; the first one's context counts for autocast.
        batch_from: the tap whose first argument is the batch; None if it is an argument of the student itself.
        class_head: reads the predicted classes, if they are distilled.
        others: further taps, which the engine reads for targets.
    """

    parts: list[tuple[Tap, Convert]]
    batch_from: Tap | None = None
    class_head: ClassHead | None = None
    others: list[Tap] = field(default_factory=list)

    def _taps(self) -> list[Tap]:
        head = [] if self.class_head is None else list(self.class_head.taps)
        return [*(tap for tap, _ in self.parts), *head, *self.others]

    def arm(self) -> None:
        """Record from now on."""
        for tap in self._taps():
            tap.arm()

    def disarm(self) -> None:
        """Stop recording, and forget what was recorded."""
        for tap in self._taps():
            tap.disarm()

    def pause(self, paused: bool) -> None:
        """Do not record a nested call of the student, but keep what was recorded before it."""
        for tap in self._taps():
            tap.armed = not paused

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Step:
        """Return what the student's forward with these arguments left in the taps.

        Raises:
            ConfigError: a tapped part did not run exactly once, or there is no batch of images.
        """
        calls = [(tap.read(), convert) for tap, convert in self.parts]
        batch = self.batch_from.read().first if self.batch_from else first_batch([*args, *kwargs.values()])
        if batch is None:
            raise ConfigError(
                "student", "no argument of its forward that is a tensor of four dimensions", "(N, C, H, W) images",
                "the teacher is given the student's batch",
            )  # fmt: skip
        features: dict[str, Tensor] = {}
        for call, convert in calls:
            features.update(convert(call.output, batch))
        predictions = None
        if self.class_head is not None:
            predictions = self.class_head.read()
            features[CLASSES] = predictions.logits
        first = calls[0][0] if calls else self.class_head.taps[0].read(last=True)  # type: ignore[union-attr]
        return Step(batch, features, predictions, first)

    @staticmethod
    def read_other(tap: Tap) -> Call:
        """Return the last call of one of ``others``; a transform may run more than once."""
        return tap.read(last=True)

    def remove(self) -> None:
        """Take all taps off, the last one first."""
        for tap in reversed(self._taps()):
            tap.remove()
