"""The state of a run while it runs: one line that is drawn anew on a terminal, lines in a log elsewhere."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import TextIO

__all__ = ["Progress", "duration"]

REDRAW = 0.2
"""Seconds between two drawings of the line on a terminal."""
SMOOTH = 0.1
"""The weight of the last step in the mean time of a step."""


def duration(seconds: float) -> str:
    """Write a time as hours, minutes and seconds.

    Example:
        >>> duration(3725.4)
        '1:02:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


class Progress:
    """Pace, time left and last values of a run.

    On a terminal they are one line at the bottom. Log messages take its place, and it is drawn again below them.
    Elsewhere ``log`` writes the same as a message.

    Args:
        steps: of the whole run.
        batch: images a step.
        unlabelled: images without labels a step.
        shown: this process is the one that writes.
        stream: the terminal, if it is one.
        loggers: their messages take the line's place, as those of the root logger do.
    """

    def __init__(
        self,
        steps: int,
        batch: int,
        *,
        unlabelled: int = 0,
        shown: bool = True,
        stream: TextIO | None = None,
        loggers: Sequence[str] = ("acam_kd",),
    ) -> None:
        self.steps, self.batch, self.unlabelled = steps, batch, unlabelled
        self.stream = sys.stderr if stream is None else stream
        self.live = shown and self.stream.isatty()
        self.metrics, self.loggers = "", loggers
        self._mean, self._done, self._spent = 0.0, 0, 0.0
        self._before = self._begun = perf_counter()
        self._drawn = 0.0

    def __enter__(self) -> Progress:
        names = (None, *self.loggers) if self.live else ()
        self._handlers = [handler for name in names for handler in logging.getLogger(name).handlers]
        for handler in self._handlers:
            handler.addFilter(self._clear)
        return self

    def __exit__(self, *_: object) -> None:
        for handler in self._handlers:
            handler.removeFilter(self._clear)
        self._clear()

    def start(self) -> None:
        """Begin to measure: the next step starts now, after an evaluation, say."""
        self._before = perf_counter()

    def count(self) -> None:
        """Count a step that is done."""
        now = perf_counter()
        took = now - self._before
        self._mean = took if not self._done else (1 - SMOOTH) * self._mean + SMOOTH * took
        self._before, self._done, self._spent = now, self._done + 1, now - self._begun

    def due(self) -> bool:
        """Say whether the line on the terminal is to be drawn anew."""
        return self.live and perf_counter() - self._drawn >= REDRAW

    def text(self, step: int, values: Mapping[str, float], *, rate: float) -> str:
        """Write the line: step, time left, images a second, last metric, learning rate, losses."""
        left = (self.steps - step) * self._spent / max(1, self._done)  # with the evaluations so far
        losses = "  ".join(f"{name.removeprefix('loss_')} {value:.3g}" for name, value in values.items())
        metrics = [self.metrics] if self.metrics else []
        pace = f"{self.batch / max(self._mean, 1e-9):.3g} images/s"
        if self.unlabelled:
            pace += f" + {self.unlabelled / max(self._mean, 1e-9):.3g} unlabelled"
        parts = [f"step {step}/{self.steps}", f"{duration(left)} left", pace, *metrics, f"lr {rate:.3g}", losses]
        return "  ".join(parts)

    def draw(self, text: str) -> None:
        """Draw the line on the terminal, cut to its width."""
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            self.stream.write(f"\r\x1b[K{text[:width]}")
            self.stream.flush()
            self._drawn = perf_counter()

    def _clear(self, _: object = None) -> bool:
        """Clear the line; as a filter of log handlers, let every message pass."""
        if self.live and self._drawn:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
        self._drawn = 0.0
        return True
