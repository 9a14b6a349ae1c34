"""The seconds of a training step and of its parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from acam_kd.core import Distillation

__all__ = ["PARTS", "Clock", "StepTimer"]

PARTS = ("teacher", "student forward", "distiller", "backward")
"""The parts of a step, which add up to it. The student's forward is the forward without teacher and distiller."""


class Clock:
    """A clock whose moments are, on a GPU, events of its stream, so that asking it makes nobody wait.

    Args:
        on_gpu: the measured code runs on the current CUDA device.
    """

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu

    def now(self) -> Any:
        """Return this moment, for ``seconds``."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Return the seconds between two moments; call ``wait`` first."""
        return start.elapsed_time(end) / 1e3 if self.on_gpu else end - start

    def wait(self) -> None:
        """Wait until everything that was started has ended."""
        if self.on_gpu:
            torch.cuda.synchronize()


class StepTimer:
    """A timer for the steps of one model, without the optimizer's part.

    Args:
        model: its teacher is wrapped and its distiller gets hooks.
        clock: the clock of the model's device.
        autocast: the dtype under which the forward runs, as in automatic mixed precision; None for no autocast.
    """

    def __init__(self, model: nn.Module, clock: Clock, autocast: torch.dtype | None = None) -> None:
        self.model, self.clock, self.autocast = model, clock, autocast
        self._spans: dict[str, list[list[Any]]] = {}
        attached = getattr(model, "distillation", None)
        if isinstance(attached, Distillation):
            attached.teacher = _Timed(attached.teacher, self)  # type: ignore[assignment]
            attached.method.register_forward_pre_hook(lambda *_: self.begin("distiller"))
            attached.method.register_forward_hook(lambda *_: self.end("distiller"))

    def begin(self, part: str) -> None:
        """Mark the beginning of a part."""
        self._spans.setdefault(part, []).append([self.clock.now()])

    def end(self, part: str) -> None:
        """Mark the end of a part, that of its last beginning."""
        self._spans[part][-1].append(self.clock.now())

    def __call__(self, *inputs: Any) -> dict[str, float]:
        """Make a step: forward, clearing the last step's gradients as trainers do, backward.

        Returns:
            Part -> seconds.
        """
        self._spans = {}
        self.clock.wait()
        start = self.clock.now()
        loss = self.forward(*inputs)
        middle = self.clock.now()
        self.model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        end = self.clock.now()
        self.clock.wait()
        within = {
            part: sum(self.clock.seconds(*span) for span in self._spans.get(part, ()))
            for part in ("teacher", "distiller")
        }
        parts = {
            **within,
            "student forward": self.clock.seconds(start, middle) - sum(within.values()),
            "backward": self.clock.seconds(middle, end),
        }
        return {part: parts[part] for part in PARTS}

    def forward(self, *inputs: Any) -> Tensor:
        """Return the sum of the losses."""
        with self.precision():
            losses: dict[str, Tensor] = self.model(*inputs)
        return torch.stack([loss.float() for loss in losses.values()]).sum()

    def precision(self) -> torch.autocast:
        """Return the context of the forward."""
        device = "cuda" if self.clock.on_gpu else "cpu"
        return torch.autocast(device, self.autocast, enabled=self.autocast is not None)


class _Timed:
    """A teacher whose calls are timed; in all else it is the teacher."""

    def __init__(self, teacher: Callable[..., Any], timer: StepTimer) -> None:
        self._teacher, self._timer = teacher, timer

    def __call__(self, *args: Any) -> Any:
        self._timer.begin("teacher")
        features = self._teacher(*args)
        self._timer.end("teacher")
        return features

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)
