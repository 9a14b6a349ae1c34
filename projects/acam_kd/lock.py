"""A lock on an output folder: two runs never write into one folder."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import logging
import os
import socket
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from .core.errors import ConfigError
from .files import heartbeat

__all__ = ["Lock", "Owner"]

logger = logging.getLogger("acam_kd")

NAME = "run.lock"
HEARTBEAT = 5.0
"""Seconds between two heartbeats: the lock file's time of change is set anew."""
PATIENCE = 3 * HEARTBEAT
"""Seconds without a heartbeat after which an owner on another host counts as gone."""
_held: set[str] = set()
"""The locks of this process."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock."""

    user: str
    host: str
    process: int
    since: str

    @classmethod
    def this(cls) -> Owner:
        """Describe the present process."""
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # as in a container whose user has no name
            user = f"user {os.getuid()}"
        since = datetime.now(timezone.utc).astimezone().isoformat(sep=" ", timespec="seconds")
        return cls(user, socket.gethostname(), os.getpid(), since)

    def __str__(self) -> str:
        return f"{self.user} on {self.host}, process {self.process}, since {self.since}"


class Lock:
    """The right to write into a folder, for as long as the context lasts; the folder is made if it is not there.

    The file ``run.lock`` names the owner. The kernel holds the lock itself and drops it with the process, however that
    ends. Some network file systems do not share locks between hosts. There the owner's heartbeat decides, the time at
    which the file was last touched. A folder that was made for the lock and stays empty is removed again.

    Args:
        folder: the output folder of a run.

    Raises:
        ConfigError: on entering, if another process has the folder, or it cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / NAME
        self._made: list[Path] = []
        self._certain = True
        self._heart = contextlib.ExitStack()

    def __enter__(self) -> Lock:
        try:
            self._name = os.path.realpath(self.path)
            if self._name in _held:
                raise self._refusal(Owner.this())
            self._make_folder()
            self._file = self._acquired()
        except OSError as error:
            self._remove_folder()
            value = f"{self.folder}, which cannot be written ({error.strerror or error})"
            raise ConfigError("output", value, "a folder to write into") from error
        _held.add(self._name)
        self._heart.enter_context(heartbeat(self.path, HEARTBEAT))
        return self

    def __exit__(self, *_: object) -> None:
        self._heart.close()
        with contextlib.suppress(OSError):
            if self._is_ours(self._file):
                self.path.unlink()
        with contextlib.suppress(OSError):
            self._file.close()
        _held.discard(self._name)
        self._remove_folder()

    def _acquired(self) -> IO[str]:
        while True:
            file = open(self.path, "a+")  # noqa: SIM115 - it stays open as long as the lock
            try:
                owner = self._take(file)
                if self._is_ours(file):
                    self._check_heartbeat(owner)
                    file.truncate(0)
                    file.write(json.dumps(asdict(Owner.this())))
                    file.flush()
                    return file
            except BaseException:
                file.close()
                raise
            file.close()  # its owner removed the file after it was opened here

    def _take(self, file: IO[str]) -> Owner | None:
        """Lock the file, and return the owner that it names."""
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = True
        except (BlockingIOError, PermissionError):
            taken = False
        except OSError:  # no locks on this file system
            taken, self._certain = True, False
        owner = _read(file)
        until = time.monotonic() + HEARTBEAT
        while not taken and owner is None and time.monotonic() < until:  # it has locked, but not yet written
            time.sleep(0.05)
            owner = _read(file)
        if not taken:
            raise self._refusal(owner)
        return owner

    def _is_ours(self, file: IO[str]) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _check_heartbeat(self, owner: Owner | None) -> None:
        """Refuse if an owner that the kernel cannot see is alive; otherwise say that the folder is taken over."""
        if owner is None:
            return
        if owner.host != socket.gethostname() or not self._certain:
            logger.info("waiting %.0f s for a sign of life of %s", PATIENCE, owner)
            before, until = os.stat(self.path).st_mtime_ns, time.monotonic() + PATIENCE
            while time.monotonic() < until:
                time.sleep(HEARTBEAT / 5)
                if os.stat(self.path).st_mtime_ns != before:
                    raise self._refusal(owner)
        logger.warning("%s: taking over from %s, which has ended without a word", self.folder, owner)

    def _refusal(self, owner: Owner | None) -> ConfigError:
        return ConfigError(
            "output",
            f"{self.folder}, in which another run is at work ({owner or 'it does not say who'})",
            "a folder of no other run",
            "wait for that run, end it, or choose another {output}",
        )

    def _make_folder(self) -> None:
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)

    def _remove_folder(self) -> None:
        for path in self._made:
            try:
                path.rmdir()
            except OSError:  # it has files, or somebody else removed it
                return


def _read(file: IO[str]) -> Owner | None:
    """Read the owner; None if there is none, or it was killed while it wrote."""
    file.seek(0)
    try:
        return Owner(**json.load(file))
    except (ValueError, TypeError):
        return None
