"""A file that several processes need: one of them makes it, and the others wait for it."""

from __future__ import annotations

import errno
import fcntl
import time
from collections.abc import Callable
from pathlib import Path

from ...core.errors import RunError
from ...files import heartbeat

__all__ = ["make_once"]

POLL = 1.0
"""Seconds between two looks at a file that another process makes."""
HEARTBEAT = 5.0
"""Seconds between two signs of life of the process that makes a file."""
PATIENCE = 180.0
"""Seconds without a sign of life after which that process counts as dead; other machines see it late."""
REPORT = 60.0
"""Seconds between two reports of a process that waits."""


def make_once(
    path: str | Path, make: Callable[[], object], *, first: bool = True, waiting: Callable[[], object] = lambda: None
) -> None:
    """Make a file, unless it exists; of several processes one makes it, and the others wait until it is there.

    The process that makes the file holds a lock on ``<path>.lock`` and touches it every few seconds. Where it dies,
    another first process takes over.

    Args:
        path: the file; its folder is made.
        make: writes the file, all at once.
        first: this process may make it; the other processes of a run only wait.
        waiting: called now and then while this process waits.

    Raises:
        RunError: the folder cannot be written; or this process may not make the file, and no other one has given a
            sign of life for ``PATIENCE`` seconds, or a first one for ten times as long.
    """
    path = Path(path)
    lock = path.with_name(f"{path.name}.lock")
    sign, heard, reported = None, time.monotonic(), -REPORT
    while not path.exists():
        if first and _make_locked(path, lock, make):
            return
        now, latest = time.monotonic(), _modified(lock)
        if latest != sign:
            sign, heard = latest, now
        patience = PATIENCE if sign is not None else 10 * PATIENCE  # the first process may still look at its data
        if not first and now - heard > patience:
            raise RunError(
                f"the process that makes this file has given no sign of life for {patience:.0f} s",
                where=str(path),
                remedy="the log of the first process says why",
            )
        if now - reported >= REPORT:
            reported = now
            waiting()
        time.sleep(POLL)


def _make_locked(path: Path, lock: Path, make: Callable[[], object]) -> bool:
    """Make a file if no other process is about to; return False if one is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "a")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise RunError(
            f"the file cannot be written ({error.strerror or error})", where=str(path), remedy="choose another place"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):  # a file system without locks
                raise
        try:
            if not path.exists():
                with heartbeat(lock, HEARTBEAT):
                    make()
        finally:
            lock.unlink(missing_ok=True)
    return True


def _modified(path: Path) -> int | None:
    """Return the time of a file's last change, None if there is no file."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None
