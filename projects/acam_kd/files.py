"""Files that are written completely or not at all, or by one of several processes, and the hash of a file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .core.errors import RunError

__all__ = ["make_once", "sha256", "write_atomically"]

POLL = 1.0
"""Seconds between two looks at a file that another process makes."""
HEARTBEAT = 5.0
"""Seconds between two signs of life of the process that makes a file."""
PATIENCE = 180.0
"""Seconds without a sign of life after which that process counts as dead; other machines see it late."""
REPORT = 60.0
"""Seconds between two reports of a process that waits."""


def sha256(path: str | Path) -> str:
    """Return the hash of a file's content, as the command ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file so that nobody ever finds half of it under its name, even after a crash.

    When the function returns, content and name are on the disk. A new file gets the mode that the user's umask asks
    for. An existing file keeps its own.

    Args:
        path: the file, in a folder that exists.
        content: a text is written as UTF-8.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # the system takes the umask off
    try:
        with os.fdopen(handle, "wb") as file:
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(handle, stat.S_IMODE(path.stat().st_mode))
            file.write(data)
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where the file system can do that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # as some network shares answer
            raise
    finally:
        os.close(handle)


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
            sign of life for ``PATIENCE`` seconds.
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
        if not first and now - heard > PATIENCE:
            raise RunError(
                f"the process that makes this file has given no sign of life for {PATIENCE:.0f} s",
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
                with _heartbeat(lock):
                    make()
        finally:
            lock.unlink(missing_ok=True)
    return True


@contextlib.contextmanager
def _heartbeat(path: Path) -> Iterator[None]:
    """Touch a file every ``HEARTBEAT`` seconds."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _modified(path: Path) -> int | None:
    """Return the time of a file's last change, None if there is no file."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None
