"""Distillation, attached to a student: the step from the student's forward to the method's losses."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .attachment import Attachment
from .checks import OptimizerWatch, frozen_warning, warnings_of, watched
from .classes import CommonClasses
from .comparison import Comparison
from .distiller import Distiller
from .errors import ConfigError, Names
from .features import Pyramid
from .reader import Reader, Step
from .returned import Returned, too_high
from .scores import SCORES
from .state import load_state, state_of
from .targets import Targets
from .teacher import Extract, FrozenTeacher, evaluating
from .unlabelled import Unlabelled
from .weighting import Weighting, WeightSchedule

__all__ = ["NAME", "Distillation"]

NAME = "distillation"
"""The student's attribute."""

ReadTargets = Callable[..., Targets]
"""The arguments of the student's forward -> what is known of the batch."""


class Distillation(nn.Module):
    """A method and its frozen teacher, attached to a student as ``student.distillation``.

    In training the student's own forward runs; then a hook gives the batch to the teacher, both models' features to the
    method, and adds its losses to what the student returned. In evaluation, under ``no_grad`` and in a nested call
    nothing happens. ``state_dict()`` of the student has no key of this module, and loading does not ask for any.
    ``student.distillation.state_dict()`` has the method's parameters.

    A student returns a dict of 0-d losses, a tuple that begins with one, or one 0-d loss: the losses are added. Any
    other output is left as it is, and the losses wait in ``losses`` for the training loop to add.

    Args:
        student: attached to at once.
        teacher: called on the student's batch.
        method: its levels are named as the student's.
        levels: student's level name -> teacher's level name.
        shapes: ``"student"`` and ``"teacher"`` -> level -> its declared shape; of predictions the common classes'.
        classes: student's level name -> its common classes; left out where all are, in one order.
        reader: the student's taps.
        student_side: as much of the student as ``observe`` needs, and the function that makes features of it.
        read_targets: called if the method needs annotations.
        schedule: the weight of all losses over time.
        period: only steps whose ``iteration`` is a multiple of this are distilled. In the others the method's
            parameters get gradients of zero. No weight makes up for it: the pull is 1 / ``period`` of what it was.

    Raises:
        ConfigError: the student cannot take an attachment, or ``period`` is below 1.
    """

    logger = logging.getLogger("acam_kd")
    """Where it, and its assembly, report."""
    names: Names = staticmethod(str)
    """The engine's words for arguments, in what is reported when it is attached."""
    _student: nn.Module
    _side: tuple[nn.Module, Extract]

    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: FrozenTeacher,
        method: Distiller,
        levels: Mapping[str, str],
        shapes: Mapping[str, Pyramid],
        reader: Reader,
        student_side: tuple[nn.Module, Extract],
        classes: Mapping[str, CommonClasses] | None = None,
        read_targets: ReadTargets | None = None,
        schedule: WeightSchedule | None = None,
        period: int = 1,
    ) -> None:
        super().__init__()
        if period < 1:
            raise ConfigError("period", period, ">= 1")
        self.method, self.teacher, self.period = method, teacher, period
        self.levels, self.shapes, self.classes = dict(levels), dict(shapes), dict(classes or {})
        self._reader, self._read_targets = reader, read_targets
        self.__dict__["_student"], self.__dict__["_side"] = student, student_side  # no submodules: a cycle otherwise
        self._iteration, self._counting = -1, True
        self._warned: set[str] = set()
        self.weighting = Weighting(schedule or WeightSchedule())
        self._comparison = Comparison(self.levels, self.shapes, self.classes)
        self._watch: OptimizerWatch | None = None
        self.on_unlabelled = Unlabelled(method, reader)
        self.returned = Returned()
        self._attachment = Attachment(self, student, reader)
        student.add_module(NAME, self)
        self.train(student.training)
        self._report()

    def _report(self) -> None:
        """Log the form of each method that has several, and what is wrong before the first step."""
        for part in self.method.parts():
            if part.title() != type(part).__name__:
                self.logger.info("%s", part.title())
        for warning in self.warnings(self.names).items():
            self._warn(*warning)

    def remove(self) -> None:
        """Take everything off the student again: hooks, taps and the method's parameters.

        Weights that were trained or inherited stay.
        """
        self._attachment.remove()
        if self._watch is not None:
            self._watch.remove()
        if self._student._modules.get(NAME) is self:
            del self._student._modules[NAME]

    def forward(self, x: Any) -> Any:
        """Return the input: a student that calls its children one after the other calls this one too."""
        return x

    # The step: called by the hooks of the student.

    def _begin(self) -> None:
        """Count the step; an engine that keeps the iteration itself sets it here."""
        if self._counting:
            self._iteration += 1
        self._watch = watched(self._watch, self._student, self.method, self._warn)

    def _end(self, args: Any, kwargs: Any, output: Any) -> None:
        """Look at the step that was just distilled: for engines, which log and check."""

    def _distil(self, step: Step, args: Any, kwargs: Any) -> dict[str, Tensor]:
        """Run teacher and method on a recorded step."""
        read = self._read_targets if {*self.method.needs} - {SCORES} else None
        targets = partial(read, *args, **kwargs) if read is not None else Targets
        if self.weighting.schedule.shared and not self.returned.recomputed:
            features = self.weighting.split(step.features, self.iteration // self.period)
            step = dataclasses.replace(step, features=features)
        compared = self._comparison.run(self.teacher, self.method, step, targets)
        self.returned.finite = compared.finite
        if compared.frozen:
            self._warn("frozen", frozen_warning(compared.frozen))
        return self.weighting.weigh(compared.losses, self.iteration)

    def unlabelled(self, batch: Tensor, *, update_statistics: bool = True) -> dict[str, Tensor]:
        """Return the losses of images without labels, to be added to those of a labelled step.

        The student's tapped parts and the teacher run on the batch, the student in training mode and with gradients.
        No loss of the task is made and no label is read. Methods that need annotations are left out, by name.

        Args:
            batch: (N, C, H, W), normalised and padded as the student's backbone gets it.
            update_statistics: the student's batch norms count the batch in their running statistics.

        Returns:
            ``loss_unlabelled_<method>_<term>`` -> 0-d loss with a graph; nothing in a step that is not distilled.

        Raises:
            ConfigError: every method needs annotations, the student is in evaluation, or there is no such batch.
        """
        return self.on_unlabelled.losses(self, batch, update_statistics=update_statistics)

    @property
    def losses(self) -> dict[str, Tensor]:
        """The losses of the last distilled step.

        They have a graph, to be added to one's own loss, where the student's output could not carry them.
        """
        return self.returned.read()

    @property
    def iteration(self) -> int:
        """The current step, from 0; the number of earlier training forwards, unless an engine sets it."""
        return max(self._iteration, 0)

    @iteration.setter
    def iteration(self, value: int) -> None:
        self._iteration, self._counting = value, False

    @property
    def distils(self) -> bool:
        """The current step is distilled."""
        return self.iteration % self.period == 0 and not self.weighting.ended(self.iteration)

    def last_of(self, iterations: int) -> bool:
        """Tell if this is the last distilled step of every ``iterations`` steps: the one to log."""
        return self.distils and self.iteration // iterations != (self.iteration + self.period) // iterations

    def first_of(self, iterations: int) -> bool:
        """Tell if this is the first distilled step of every ``iterations`` steps."""
        return self.distils and self.iteration // iterations != (self.iteration - self.period) // iterations

    # What it measured.

    def metrics(self) -> dict[str, Tensor]:
        """Return the method's metrics of the last distilled step, and the ratio of its losses to the task's.

        The ratio, ``distillation_to_task``, is left out where the task's loss is 0.
        """
        measured = self.method.metrics()
        ratio = self.returned.ratio
        if ratio is not None and bool(ratio.isfinite()):
            measured = {"distillation_to_task": ratio, **measured}
        if self.weighting.schedule.shared:
            measured = {"weight": torch.tensor(self.weighting.scale), **measured}
        return measured

    def masks(self) -> dict[str, dict[str, Tensor]]:
        """Return the method's masks of the last distilled step; see ``Distiller.masks``."""
        return self.method.masks()

    def warnings(self, names: Names = str) -> dict[str, str]:
        """Return the problems of the last step: method and place -> a sentence with the argument to change.

        Args:
            names: how a front end calls an argument, as ``ACAMKD.num_masks``.
        """
        texts = warnings_of(self.method, names)
        if self.returned.too_high:
            texts["ratio"] = too_high(self.method, names)
        return texts

    def _warn(self, place: str, text: str) -> None:
        if place not in self._warned:
            self._warned.add(place)
            self.logger.warning(text)

    @torch.no_grad()
    def observe(self, batch: Tensor) -> dict[str, dict[str, Tensor]]:
        """Return the method's masks for a batch, in evaluation mode; nothing is trained.

        Every mode is restored, and so are the random numbers that a method draws.

        Args:
            batch: (N, C, H, W), normalised and padded as the student's backbone gets it.

        Returns:
            As ``Distiller.masks``; empty for a method without masks, or with none that need no annotations.
        """
        parts = [part for part in self.method.parts() if part.makes_masks and not part.needs]
        if not parts:
            return {}
        network, extract = self._side
        devices = [batch.device] if batch.is_cuda else []
        with evaluating(self._student), torch.random.fork_rng(devices):
            return self._comparison.masks(self.teacher, parts, extract(network, batch), batch)

    def raise_if_not_finite(self, losses: Any, when: str) -> None:
        """Stop before a non-finite loss reaches the weights; or, where its precision was chosen, a teacher's feature.

        Args:
            losses: the student's output in training; one without losses is not looked at.
            when: said in the message, as "iteration 7".

        Raises:
            RunError: names the losses that are not finite, and the levels where they are not.
        """
        self.returned.check_finite(losses, when, precision=self.teacher.precision, metrics=self.metrics)

    # State: the method's alone, and none of it in the student's.

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return what the method has learnt; as a part of the student, nothing."""
        if destination is not None or args:
            return destination if destination is not None else args[0]
        state = state_of(self.method, prefix=prefix, keep_vars=keep_vars)
        self.weighting.save(state, prefix)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what a method has learnt, and the factor of a shared weight.

        Raises:
            RunError: it is the state of another method, or of other levels or channels.
        """
        rest = self.weighting.load(state_dict)
        saved_for = getattr(state_dict, "_metadata", {}).get("", {}).get("method", "")
        return load_state(self.method, rest, saved_for=saved_for, strict=strict, assign=assign)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """As a part of the student: the method's tensors are in no file, so its present ones stand in."""
        for name, value in self.method.state_dict(prefix=f"{prefix}method.", keep_vars=True).items():
            state_dict.setdefault(name, value)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the watch out of copies and pickles, which look at optimizers of their own."""
        return {**self.__dict__, "_watch": None}
