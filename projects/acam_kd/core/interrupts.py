"""Ctrl-C and SIGTERM, which end a run between two steps."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

__all__ = ["Interrupted", "PassedOn", "Signals", "leave_to_parent", "one_line_interruption"]

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


@contextmanager
def one_line_interruption(program: str, again: str = "", *, said: bool = True) -> Iterator[None]:
    """End a program that a signal interrupts with one line and the status that a shell expects.

    Args:
        program: its name, for the beginning of the line.
        again: the words for the command that resumes; none if left out.
        said: print the line; of several processes one does.

    Raises:
        SystemExit: instead of KeyboardInterrupt.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        end = f"; {again} {error.remedy}" if again and isinstance(error, Interrupted) else ""
        if said:
            print(f"{program}: {str(error) or 'interrupted'}{end}", file=sys.stderr, flush=True)
        raise SystemExit(error.status if isinstance(error, Interrupted) else 128 + signal.SIGINT) from None


def _take_over(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Set the handler of both signals, but of one that is ignored, as under nohup; return those of before."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def _give_back(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


class Signals:
    """Handlers of the two signals, for as long as the context lasts; they are the main thread's.

    A signal raises ``Interrupted`` at once, except within ``step``: there it waits for the end of the step, so that a
    checkpoint holds whole steps. A second Ctrl-C does not wait. Within ``together`` a signal is only noted, since
    several processes have to stop after the same step. While an interrupted run is put in order, SIGTERM does nothing.
    """

    def __init__(self) -> None:
        self.received = 0
        self.within_step = False
        self._noted_only = self._ending = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._before = _take_over(self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        _give_back(self._before)

    def _receive(self, number: int, _: FrameType | None) -> None:
        again = self.received and number == signal.SIGINT
        self.received = self.received or number
        if again or not (self.within_step or self._noted_only or self._ending):
            self.stop()

    def stop(self, number: int = 0) -> None:
        """Raise ``Interrupted``.

        Args:
            number: the signal, if another process received it.
        """
        self._ending = True
        self.received = self.received or number
        raise Interrupted(number=self.received)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Keep signals waiting until the end."""
        self.within_step = True
        yield
        self.within_step = False  # an error leaves it: the state is then not that of a whole step
        if self.received and not self._noted_only:
            self.stop()

    @contextmanager
    def together(self, several: bool) -> Iterator[None]:
        """Only note signals, if there are several processes."""
        before, self._noted_only = self._noted_only, several
        try:
            yield
        finally:
            self._noted_only = before


class PassedOn:
    """Handlers that pass both signals on to the processes that this one started, and waits for.

    The children receive SIGTERM. At a Ctrl-C on a terminal they have received that as well, and end a run by either.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> PassedOn:
        self._before = _take_over(self._pass)
        return self

    def __exit__(self, *_: object) -> None:
        _give_back(self._before)

    def _pass(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or number
        for child in multiprocessing.active_children():
            with suppress(ProcessLookupError):
                os.kill(child.pid or 0, signal.SIGTERM)


def leave_to_parent(_: int = 0) -> None:
    """Let a data loader's worker leave both signals to its parent, which ends the worker after the run's last step.

    A terminal sends Ctrl-C to all processes of a command, and schedulers send SIGTERM to all of them. The worker ends
    at a SIGTERM that its parent sends, and after its parent has ended.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process()  # the system's parent may be a server that starts processes
    threading.Thread(target=_end_with, args=(parent.pid if parent else os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """Wait for a SIGTERM from one process, and end."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
