"""The contract of a distillation method."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .errors import ConfigError
from .features import BACKBONE, LOGITS, Channels, Features, Pyramid, as_pyramid
from .renamed import reading_former_names
from .targets import Targets

__all__ = [
    "ALL",
    "FIRST_FOUR",
    "LAST",
    "NOTHING_KNOWN",
    "Distiller",
    "Recipe",
    "align_levels",
    "check_weights",
    "method_arguments",
]

NOTHING_KNOWN = Targets()
"""The targets for methods that need nothing but features."""


ALL, FIRST_FOUR, LAST = (0, None), (0, 4), (-1, None)
"""Levels of a recipe: all; P2 to P5 of an R-CNN, P3 to P6 of a one-stage detector; and the last ones of a segmentor."""


@dataclass(frozen=True)
class Recipe:
    """The settings of a method for one kind of model; they are used where the user leaves them open.

    Args:
        source: the place where the values are published, or a note that they are an assumption.
        arguments: hyper-parameters; some equal the defaults of the constructor.
        levels: the backbone's levels to distil, from the finest: the first and the one after the last, as of a slice,
            since frameworks name them differently.
        taps: some of ``TAPS``.
    """

    source: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    levels: tuple[int, int | None] = ALL
    taps: tuple[str, ...] = ()


class Distiller(nn.Module):
    """A method that turns the features of student and teacher into named losses.

    Both pyramids have the student's level names, whatever the teacher calls its levels.

    A method is a subclass, registered in ``DISTILLER_REGISTRY``. Its hyper-parameters are further keyword arguments
    with defaults; every front end makes them settings of its own. It keeps to four rules, which the contract test
    checks for all registered methods:

    * ``forward`` returns weighted, finite 0-d losses under the keys ``loss_<method>_<term>``;
    * no gradient reaches the teacher's features;
    * every parameter gets a gradient at every step, or DistributedDataParallel stops;
    * diagnostics are returned by ``metrics``, never among the losses: the trainer sums every loss.

    A method can be used alone: ``PKD({"p3": 256}, {"p3": 256})`` takes the channels of each level, and is then called
    on two dicts of maps. Its constructor finds the shapes in ``student_levels`` and ``teacher_levels``.

    Everything that a method keeps of a step is in ``self._step``. ``forward`` fills this dict with detached values,
    under keys of the method's choice; ``metrics``, ``masks`` and ``warnings`` read it. It is empty before the first
    step. Copies and pickles leave its contents out.

    Args:
        student_channels, teacher_channels: the levels to distil, with the same keys: their channels, or their shapes.
    """

    reads: tuple[str, ...] = (BACKBONE, LOGITS)
    """The taps whose levels the method can use; it is given no others."""
    needs: tuple[str, ...] = ()
    """The fields of ``Targets`` that the method uses: any of ``boxes``, ``labels``, and ``scores``, which are the
    teacher's. Fields that no method needs are left empty."""
    auxiliary: tuple[str, ...] = ()
    """The losses that train the method's own parameters and never reach the student. The ratio of the distillation's
    losses to the task's leaves them out."""
    families: tuple[str, ...] = ()
    """The kinds of model, as ``Adapter.family`` names them, that the method has a meaning for; empty for all."""
    teacherless: bool = False
    """The method learns from the student alone. Without a teacher it gets the student's own maps, detached."""
    recipes: Mapping[str, Recipe] = {}
    """Kind of model, as ``Adapter.family`` names it -> the settings for it."""
    renamed: Mapping[str, str] = {}
    """Former name of an argument -> its name. Every front end and the constructor still read the former one."""
    renamed_values: Mapping[str, Mapping[str, str]] = {}
    """Argument -> former value -> its value, read in the same way."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Let the constructor read former names, if there are any."""
        super().__init_subclass__(**arguments)
        if "__init__" in vars(cls) and (cls.renamed or cls.renamed_values):
            cls.__init__ = reading_former_names(cls, cls.__init__)  # type: ignore[method-assign]

    def __init__(self, student_channels: Channels, teacher_channels: Channels) -> None:
        super().__init__()
        self.student_levels, self.teacher_levels = as_pyramid(student_channels), as_pyramid(teacher_channels)
        self.levels = list(self.student_levels)
        if self.student_levels.keys() != self.teacher_levels.keys():
            raise ConfigError(
                "teacher_channels",
                f"the levels {', '.join(self.teacher_levels)}",
                f"those of the student, {', '.join(self.levels)}",
            )
        self._step: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles: all but what was kept of the last step."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_step": {}}

    def forward(self, student: Features, teacher: Features, targets: Targets = NOTHING_KNOWN) -> dict[str, Tensor]:
        """Return the losses of one step; features are (N, C, H, W) per level."""
        raise NotImplementedError

    def title(self) -> str:
        """Return the method's name for the log; one that has several forms says which of them runs."""
        return type(self).__name__

    def parts(self) -> list[Distiller]:
        """Return the methods that this one consists of: itself alone, unless it combines several."""
        return [self]

    def metrics(self) -> dict[str, Tensor]:
        """Return diagnostics of the last step, 0-d and detached, under ``<level>/<quantity>``."""
        return {}

    def masks(self) -> dict[str, dict[str, Tensor]]:
        """Return the masks of the last step, for pictures: level -> kind -> masks, detached.

        Kinds are ``"spatial"``, (N, M, H, W), and ``"channel"``, (N, M, C). A method without masks returns none.
        """
        return {}

    @property
    def makes_masks(self) -> bool:
        """The method has masks to show."""
        return type(self).masks is not Distiller.masks

    def warnings(self) -> dict[str, str]:
        """Return the problems that the last step showed, or before the first those of the arguments.

        The result maps a place to a plain sentence.

        A sentence names the level, and the argument to change as a ``{argument}`` field: "set {num_masks} to 3".
        The engine fills such fields with its own names; a sentence has no other braces. The engine reports
        each place once per run.
        """
        return {}


def align_levels(student: Pyramid, teacher: Pyramid) -> nn.ModuleDict:
    """Build one 1x1 convolution per level from the student's channels to the teacher's; none on logits.

    A convolution starts as the identity where the channels match. That is an assumption; the papers do not say.
    Logits have a meaning, class by class, so they are compared as they are. That is an assumption too; MasKD does so.
    """
    aligned = nn.ModuleDict()
    for level, spec in student.items():
        if spec.logits:
            aligned[level] = nn.Identity()
            continue
        conv = nn.Conv2d(spec.channels, teacher[level].channels, 1)
        if conv.in_channels == conv.out_channels:
            nn.init.dirac_(conv.weight)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        aligned[level] = conv
    return aligned


def check_weights(**weights: float) -> None:
    """Raise ConfigError for a loss weight that is negative or not finite."""
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ConfigError(name, weight, ">= 0 and finite")


def method_arguments(method: type) -> dict[str, Any]:
    """Return the hyper-parameters of a method, argument -> default: its constructor's keyword-only arguments."""
    parameters = inspect.signature(method).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
