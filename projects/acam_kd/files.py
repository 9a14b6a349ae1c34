"""Files that are written completely or not at all, json that is json, the hash of a file, and the cache folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import stat
from pathlib import Path
from typing import Any

__all__ = ["cache_folder", "sha256", "strict_json", "write_atomically"]


def cache_folder() -> Path:
    """Return the folder for what can be made again: ``$ACAM_KD_CACHE``, else ``acam-kd`` in the user's cache folder."""
    if own := os.environ.get("ACAM_KD_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "acam-kd"


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


def strict_json(content: object, *, indent: int | None = None) -> str:
    """Return a text that every reader of json takes: null for numbers that are not finite.

    Example:
        >>> strict_json({"AP": float("nan"), "AR": 0.5})
        '{"AP": null, "AR": 0.5}'
    """
    try:
        return json.dumps(content, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
