"""The hooks of a distillation on its student: one training forward, from the call to the losses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .calls import Calls
from .errors import ConfigError, RunError
from .reader import Reader
from .taps import leave_to_python

if TYPE_CHECKING:
    from .distillation import Distillation

__all__ = ["Attachment"]


class Attachment:
    """The two hooks that follow the calls of a student.

    A pre-hook arms the taps, and a hook gives what they recorded to the distillation. Only the outermost call in
    training, with gradients, is distilled.

    Args:
        distillation: runs the step.
        student: gets the hooks at once.
        reader: the student's taps.
    """

    def __init__(self, distillation: Distillation, student: nn.Module, reader: Reader) -> None:
        self._distillation, self._student, self._reader = distillation, student, reader
        self._calls = Calls()
        self._active, self._active_before = False, True
        self._resting = False
        self._handles = [
            student.register_forward_pre_hook(self._before, with_kwargs=True),
            student.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        """Take hooks and taps off the student."""
        self._reader.remove()
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Let the student run without a step of distillation: no tap records, and nothing is counted."""
        before, self._resting = self._resting, True
        try:
            yield
        finally:
            self._resting = before

    @leave_to_python
    def _before(self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if student is not self._student:
            raise ConfigError(
                "student",
                "a copy of it that shares its hooks",
                "DistributedDataParallel or deepcopy",
                "nn.DataParallel and copy.copy do not carry a distillation",
            )
        if self._resting:
            return
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
            self._distillation.returned.check_read()
            self._check_hooks(student)
            self._distillation._begin()
        self._distillation.returned.begin(recomputed=recomputed)
        if self._distillation.distils:
            self._reader.arm()

    @leave_to_python
    def _after(self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        distillation = self._distillation
        if self._resting:
            return None
        if not self._calls.end():
            self._check_hooks(student)
            self._reader.pause(not (self._active and distillation.distils))
            return None
        active, self._active = self._active, False
        if self._calls.failed() or not active:
            self._reader.disarm()
            return None
        returned, method = distillation.returned, distillation.method
        if not distillation.distils:
            return returned.merge(output, None, method)
        try:
            step = self._reader.read(args, kwargs)
            self._reader.pause(True)
            losses = distillation._distil(step, args, kwargs)
        finally:
            self._reader.disarm()
        merged = returned.merge(output, losses, method)
        if returned.recomputed:
            returned.restore()
            return merged
        distillation._end(args, kwargs, output if merged is None else merged)
        return merged

    def _check_hooks(self, student: nn.Module) -> None:
        """Notice hooks that others took off the student: it would learn from nobody, in silence."""
        before, after = self._handles
        if before.id not in student._forward_pre_hooks or after.id not in student._forward_hooks:
            raise RunError(
                "the distillation's hooks were taken off the student", type(student).__name__,
                "call student.distillation.remove(), and attach again",
            )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        """Leave a call under way out of copies and pickles."""
        return {**self.__dict__, "_active": False, "_resting": False}
