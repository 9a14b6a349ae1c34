"""Files that are written completely or not at all, JSON without NaN, the hash of a file, and the cache folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import stat
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["cache_folder", "heartbeat", "numbers", "sha256", "to_json", "whole_file", "write_atomically"]


def cache_folder() -> Path:
    """Return the folder for what can be made again: ``$ACAM_KD_CACHE``, else ``acam-kd`` in the user's cache folder."""
    if own := os.environ.get("ACAM_KD_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "acam-kd"


@contextlib.contextmanager
def heartbeat(path: str | Path, seconds: float) -> Iterator[None]:
    """Touch a file every so many seconds while the context lasts: a sign of life for other processes."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(seconds):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Write a value as JSON, with null for every number that is not finite.

    Python's own ``json.dumps`` writes NaN and Infinity, which no other reader of JSON accepts.

    Example:
        >>> to_json({"AP": 12.5, "APs": float("nan")})
        '{"AP": 12.5, "APs": null}'
    """
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:  # a number is not finite; most values are written at once
        return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics that were read from JSON, with NaN for null.

    Example:
        >>> numbers({"AP": 12.5, "APs": None})
        {'AP': 12.5, 'APs': nan}
    """
    return {name: math.nan if value is None else value for name, value in values.items()}


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
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def whole_file(path: str | Path, mode: str = "wb") -> Iterator[Any]:
    """Open a file for writing that gets its name when it is complete; see ``write_atomically``.

    Args:
        path: the file, in a folder that exists.
        mode: ``"wb"``, or ``"w"`` for a text.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # the system takes the umask off
    try:
        with os.fdopen(handle, mode) as file:
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(handle, stat.S_IMODE(path.stat().st_mode))
            yield file
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
