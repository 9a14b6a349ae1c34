"""Ctrl-C and SIGTERM, which end a run between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Interrupted", "Signals", "leave_to_parent"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The end of a run by a signal; its text says what was saved.

    Args:
        saved: a sentence on the checkpoint.
        number: the signal.
    """

    def __init__(self, saved: str = "", number: int = signal.SIGINT) -> None:
        super().__init__(saved, number)
        self.saved, self.number = saved, number

    @classmethod
    def of(cls, error: KeyboardInterrupt, saved: str) -> Interrupted:
        """Make one of another interruption, with the sentence on the checkpoint."""
        return cls(saved, error.number if isinstance(error, Interrupted) else signal.SIGINT)

    def __str__(self) -> str:
        return f"interrupted: {self.saved or 'nothing was saved'}"

    @property
    def remedy(self) -> str:
        """The end of a sentence that begins with the command."""
        return "resumes there" if self.saved else "starts at step 0"

    @property
    def status(self) -> int:
        """The exit status that a shell expects."""
        return 128 + self.number


class Signals:
    """Handlers of the two signals, for as long as the context lasts; they are the main thread's.

    A signal raises ``Interrupted`` at once, except within ``step``: there it waits for the end of the step, so that a
    checkpoint holds whole steps. A second Ctrl-C does not wait. Within ``together`` a signal is only noted, since
    several processes have to stop after the same step.
    """

    def __init__(self) -> None:
        self.received = 0
        self.within_step = False
        self._noted_only = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        again = self.received == number == signal.SIGINT
        self.received = number
        if again or not (self.within_step or self._noted_only):
            raise Interrupted(number=number)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Keep signals waiting until the end."""
        self.within_step = True
        yield
        self.within_step = False  # an error leaves it: the state is then not that of a whole step
        if self.received and not self._noted_only:
            raise Interrupted(number=self.received)

    @contextmanager
    def together(self, several: bool) -> Iterator[None]:
        """Only note signals, if there are several processes."""
        before, self._noted_only = self._noted_only, several
        try:
            yield
        finally:
            self._noted_only = before


def leave_to_parent(_: int = 0) -> None:
    """Let a data loader's worker ignore Ctrl-C, which its parent has received too, and end at SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
