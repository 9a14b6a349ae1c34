"""The processes of a comparison's runs: started, waited for, and ended together."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from ..core.errors import RunError

__all__ = ["Processes"]

PATIENCE = 10.0
"""Seconds between asking a run to end and killing it."""


class Interrupted(Exception):
    """The end of a run because the whole comparison ends."""


class Processes:
    """The processes that are at work now. Several on one GPU share it.

    Args:
        jobs: the number of processes at once, which share the cores.
    """

    def __init__(self, jobs: int) -> None:
        self.stopping = threading.Event()
        self.children: set[int] = set()
        self.lock = threading.Lock()
        self.environment = dict(os.environ)
        if jobs > 1:
            self.environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
            self.environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    @contextlib.contextmanager
    def locked(self, path: Path) -> Iterator[IO[str]]:
        """Lock a run's folder. Its process inherits the lock, because it may outlive a comparison that was killed."""
        with open(path, "a") as file:
            waiting = False
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not waiting:
                        print(f"waiting for the process that still works in {path.parent}", flush=True)
                    waiting = True
                    if self.stopping.wait(1.0):
                        raise Interrupted from None
            yield file

    def call(self, command: Sequence[str], log: Path, lock: IO[str]) -> float:
        """Run a process to its end, and return the peak of its memory in GiB.

        Args:
            command: its program and arguments.
            log: a file, which gets its output at the end.
            lock: the file of ``locked``.

        Raises:
            Interrupted: all processes are being ended.
            RunError: it failed; the last line of its output is the reason.
        """
        with open(log, "a") as file:
            with self.lock:
                if self.stopping.is_set():
                    raise Interrupted
                process = subprocess.Popen(
                    command,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=self.environment,
                    pass_fds=(lock.fileno(),),
                    start_new_session=True,
                )
                self.children.add(process.pid)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            with self.lock:
                self.children.discard(process.pid)
        if self.stopping.is_set() and status:
            raise Interrupted
        if status:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise RunError(lines[-1].strip() if lines else f"exit status {process.returncode}")
        return usage.ru_maxrss / 2**20

    def stop(self) -> None:
        """End all processes. Their runs can be resumed from their last checkpoints."""
        self.stopping.set()
        self._signal(signal.SIGTERM)
        until = time.monotonic() + PATIENCE
        while self.children and time.monotonic() < until:
            time.sleep(0.1)
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with self.lock:
            for pid in self.children:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, number)
