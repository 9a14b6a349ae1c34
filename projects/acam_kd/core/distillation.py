"""Distillation, attached to a student: the step from the student's forward to the method's losses."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .calls import Calls
from .checks import OptimizerWatch
from .classes import CommonClasses
from .comparison import Comparison
from .distiller import Distiller, method_arguments
from .errors import ConfigError, Names, RunError, names_of, rendered
from .features import Pyramid
from .outputs import losses_of, non_finite, with_losses, with_unused
from .pairing import paired
from .reader import Reader, Step
from .state import load_state, state_of
from .taps import leave_to_python
from .targets import Targets
from .teacher import Extract, FrozenTeacher, evaluating
from .weighting import Weighting, WeightSchedule

__all__ = ["NAME", "Distillation"]

NAME = "distillation"
"""The student's attribute."""

HIGH, LONG = 10, 100
"""The ratio of the distillation's losses to the task's, and the number of steps above it, that are reported."""

SCALE = "weighting.scale"
"""The entry of a shared weight in ``state_dict``."""

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

    _student: nn.Module
    _side: tuple[nn.Module, Extract]
    _losses: dict[str, Tensor]
    _finite: dict[str, Tensor]
    _ratio: Tensor | None
    _high: Tensor | None
    _waiting: bool
    _active_before: bool
    _recomputed: tuple[dict[str, Tensor], bool] | None

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
        self._forget_step()
        self._attach(student)

    # Attaching.

    def _attach(self, student: nn.Module) -> None:
        self._handles = [
            student.register_forward_pre_hook(self._before, with_kwargs=True),
            student.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        student.add_module(NAME, self)
        self.train(student.training)
        for part in self.method.parts():
            if part.title() != type(part).__name__:  # it has several forms
                self.logger.info("%s", part.title())

    def remove(self) -> None:
        """Take everything off the student again: hooks, taps and the method's parameters.

        Weights that were trained or inherited stay.
        """
        self._reader.remove()
        for handle in self._handles:
            handle.remove()
        if self._watch is not None:
            self._watch.remove()
        if self._student._modules.get(NAME) is self:
            del self._student._modules[NAME]

    def forward(self, x: Any) -> Any:
        """Return the input: a student that calls its children one after the other calls this one too."""
        return x

    # One training forward of the student: _before, the taps, _after.

    @leave_to_python
    def _before(self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if student is not self._student:
            raise ConfigError(
                "student",
                "a copy of it that shares its hooks",
                "DistributedDataParallel or deepcopy",
                "nn.DataParallel and copy.copy do not carry a distillation",
            )
        if not self._calls.begin():
            self._reader.pause(True)
            return
        self._reader.disarm()
        recomputed = torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]  # a checkpoint, in backward
        if recomputed and not self._active_before:
            raise ConfigError(
                "student", "a checkpoint with use_reentrant=True around it", "use_reentrant=False",
                "the first forward had no gradient, so it was not distilled",
            )  # fmt: skip
        self._active = self._active_before = student.training and torch.is_grad_enabled()
        if not self._active:
            return
        if not recomputed:
            self._check_read()
            self._check_hooks(student)
            self._begin()
        self._recomputed = (self._losses, self._waiting) if recomputed else None
        self._losses, self._finite, self._ratio = {}, {}, None
        if self.distils:
            self._reader.arm()

    @leave_to_python
    def _after(self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self._calls.end():
            self._check_hooks(student)
            self._reader.pause(not (self._active and self.distils))
            return None
        active, self._active = self._active, False
        if self._calls.failed() or not active:
            self._reader.disarm()
            return None
        if not self.distils:
            return self._merged(output, None)
        try:
            step = self._reader.read(args, kwargs)
            self._reader.pause(True)
            losses = self._distil(step, args, kwargs)
        finally:
            self._reader.disarm()
        merged = self._merged(output, losses)
        if self._recomputed is not None:
            (self._losses, self._waiting), self._recomputed = self._recomputed, None
            return merged
        self._end(args, kwargs, output if merged is None else merged)
        return merged

    def _check_hooks(self, student: nn.Module) -> None:
        """Notice hooks that others took off the student: it would learn from nobody, in silence."""
        before, after = self._handles
        if before.id not in student._forward_pre_hooks or after.id not in student._forward_hooks:
            raise RunError(
                "the distillation's hooks were taken off the student", type(student).__name__,
                "call student.distillation.remove(), and attach again",
            )  # fmt: skip

    def _begin(self) -> None:
        """Count the step; an engine that keeps the iteration itself sets it here."""
        if self._counting:
            self._iteration += 1
        if self._watch is None and any(p.requires_grad for p in self.method.parameters()):
            self._watch = OptimizerWatch(self._student, self.method)
        elif self._watch is not None and (self._watch.trained or self._watch.forgotten):
            self._watch.remove()  # it has seen enough: it looks at every parameter at every step
        if self._watch is not None and self._watch.forgotten:
            self._warn(
                "optimizer", "the method's parameters are in no optimizer that trains the student: they stay at their "
                "random start. Build the optimizer from student.parameters(), or add student.distillation.parameters()",
            )  # fmt: skip

    def _end(self, args: Any, kwargs: Any, output: Any) -> None:
        """Look at the step that was just distilled: for engines, which log and check."""

    def _distil(self, step: Step, args: Any, kwargs: Any) -> dict[str, Tensor]:
        """Run teacher and method on a recorded step."""
        read = self._read_targets if self.method.needs else None
        targets = partial(read, *args, **kwargs) if read is not None else Targets
        if self.weighting.schedule.shared and self._recomputed is None:
            step = dataclasses.replace(step, features=self.weighting.split(step.features, self._distilled))
        compared = self._comparison.run(self.teacher, self.method, step, targets)
        self._finite = compared.finite
        if compared.frozen:
            self._warn(
                "frozen",
                f"no gradient reaches the student at {', '.join(compared.frozen)}: leave these levels out, if that "
                "part is frozen; or checkpoint it with use_reentrant=False",
            )
        return self.weighting.weigh(compared.losses, self.iteration)

    # What the student returns.

    def _merged(self, output: Any, losses: dict[str, Tensor] | None) -> Any:
        """Add the losses to the student's output, or, without any, gradients of zero for the method's parameters.

        Returns:
            The output with the losses, or None to leave it untouched, and the losses waiting.
        """
        task = losses_of(output)
        if not task:
            unused = {} if losses is not None else with_unused({"loss_unused": self._zero()}, self.method)
            self._losses, self._waiting = {**(losses or {}), **unused}, True
            return None
        if clash := sorted(task.keys() & (losses or {}).keys()):
            raise ConfigError("method", f"losses that the student has too: {', '.join(clash)}", "names of its own")
        self._losses, self._waiting = {name: x.detach() for name, x in (losses or {}).items()}, False
        if losses:
            own, others = (torch.stack([x.detach().float() for x in part.values()]).sum() for part in (losses, task))
            self._ratio = own / others
            self._high = torch.where(self._ratio > HIGH, self._high + 1, 0) if self._high is not None else 0 * own
        return with_losses(output, with_unused(task, self.method) if losses is None else {**task, **losses})

    def _zero(self) -> Tensor:
        parameter = next(self.parameters(), None)
        return torch.zeros((), device=parameter.device if parameter is not None else None)

    @property
    def losses(self) -> dict[str, Tensor]:
        """The losses of the last distilled step.

        They have a graph, to be added to one's own loss, where the student's output could not carry them.
        """
        self._waiting = False
        return dict(self._losses)

    def _check_read(self) -> None:
        if self._waiting:
            self._waiting = False  # said once a step
            raise ConfigError(
                "student", "an output that cannot carry the losses of the last step, which nobody used",
                "a dict of losses, or a training loop that adds them",
                "after every forward write: loss = criterion(student(images), labels) + "
                "sum(student.distillation.losses.values())",
            )  # fmt: skip

    # Steps.

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

    @property
    def _distilled(self) -> int:
        return self.iteration // self.period

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
        if self._ratio is not None and bool(self._ratio.isfinite()):
            measured = {"distillation_to_task": self._ratio, **measured}
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
        texts: dict[str, str] = {}
        for part in self.method.parts():
            method = type(part).__name__
            theirs = names_of(method, method_arguments(type(part)), names)
            texts.update({f"{method}/{place}": rendered(text, theirs) for place, text in part.warnings().items()})
        if self._high is not None and int(self._high) >= LONG:
            weight = f"{type(self.method.parts()[0]).__name__}.alpha"
            texts["ratio"] = (
                f"the distillation's losses have been more than {HIGH} times the task's for {LONG} steps: lower "
                f"{names(weight)}, or set {names('weight')} to share"
            )
        return texts

    def _warn(self, place: str, text: str) -> None:
        if place not in self._warned:
            self._warned.add(place)
            self.logger.warning(text)

    @torch.no_grad()
    def observe(self, batch: Tensor) -> dict[str, dict[str, Tensor]]:
        """Return the method's masks for a batch, in evaluation mode; nothing is trained, every mode is restored.

        Args:
            batch: (N, C, H, W), normalised and padded as the student's backbone gets it.

        Returns:
            As ``Distiller.masks``; empty for a method without masks, or with none that need no annotations.
        """
        network, extract = self._side
        with evaluating(self._student):
            features = extract(network, batch)
            levels = {s: t for s, t in self.levels.items() if s in features}
            resized = self._comparison.resized
            student, teacher = paired(features, self.teacher(batch), levels, self.classes, cast=True, resized=resized)
            for part in self.method.parts():
                if not part.needs and all(level in student for level in part.levels):
                    part(student, teacher)
                    if masks := part.masks():
                        return masks
        return {}

    def raise_if_not_finite(self, losses: Any, when: str) -> None:
        """Stop before a non-finite loss reaches the weights; or, where its precision was chosen, a teacher's feature.

        Args:
            losses: the student's output in training; one without losses is not looked at.
            when: said in the message, as "iteration 7".

        Raises:
            RunError: names the losses that are not finite, and the levels where they are not.
        """
        finite = torch.stack([*self._finite.values()]).tolist() if self._finite else []  # the device is asked once
        if broken := [level for level, ok in zip(self._finite, finite) if not ok]:
            raise RunError(
                f"the teacher's features, made in {self.teacher.precision}, are not finite: {', '.join(broken)}", when,
                "float16, be it the student's, ends at 65504; see {teacher_precision}",
            )  # fmt: skip
        terms = non_finite(losses_of(losses))
        if terms:
            places = [name for name, value in self.metrics().items() if not math.isfinite(value)]
            where = f" (not finite there: {', '.join(places)})" if places else ""
            raise RunError(
                f"loss is not finite: {', '.join(terms)}{where}", when, "lower the learning rate or the method's weight"
            )

    # State: the method's alone, and none of it in the student's.

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return what the method has learnt; as a part of the student, nothing."""
        if destination is not None or args:
            return destination if destination is not None else args[0]
        state = state_of(self.method, prefix=prefix, keep_vars=keep_vars)
        if self.weighting.schedule.shared:
            if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
                self.weighting.update()  # else a resumed run would not know of the last measurement
            state[prefix + SCALE] = torch.tensor(self.weighting.scale, dtype=torch.float64)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what a method has learnt, and the factor of a shared weight.

        Raises:
            RunError: it is the state of another method, or of other levels or channels.
        """
        rest = {name: value for name, value in state_dict.items() if name != SCALE}
        if SCALE in state_dict:
            self.weighting.resume(float(state_dict[SCALE]))
        saved_for = getattr(state_dict, "_metadata", {}).get("", {}).get("method", "")
        return load_state(self.method, rest, saved_for=saved_for, strict=strict, assign=assign)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """As a part of the student: the method's tensors are in no file, so its present ones stand in."""
        for name, value in self.method.state_dict(prefix=f"{prefix}method.", keep_vars=True).items():
            state_dict.setdefault(name, value)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _forget_step(self) -> None:
        self._calls = Calls()
        self._active, self._active_before, self._waiting = False, True, False
        self._recomputed = None
        self._losses, self._finite, self._ratio, self._high = {}, {}, None, None

    def __getstate__(self) -> dict[str, Any]:
        """Leave tensors of a step out of copies and pickles, which look at optimizers of their own."""
        forgotten: dict[str, Any] = {"_active": False, "_waiting": False, "_watch": None, "_recomputed": None}
        return {**self.__dict__, **forgotten, "_losses": {}, "_finite": {}, "_ratio": None, "_high": None}
