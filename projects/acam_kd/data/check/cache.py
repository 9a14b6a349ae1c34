"""The cache of the checks: facts of files that have not changed since, and reports.

It lies in the folder ``$ACAM_KD_CACHE``, else in ``acam-kd`` of the user's cache folder. Nothing depends on it: a file
that is missing or broken is made anew, and where nothing can be written the checks only take longer.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import PIL

from ...files import cache_folder, to_json, write_atomically

__all__ = ["VERSION", "FileFacts", "file_state", "read_entry", "write_entry", "write_text"]

VERSION = f"1, Pillow {PIL.__version__}"
"""Raised with every change of the checks, so that older entries are forgotten."""
KEPT = 64
"""The number of entries that a folder of the cache keeps."""

State = tuple[int, int]
"""Size in bytes and time of the last change in nanoseconds."""


def file_state(path: str) -> State | None:
    """Return what changes when a file is changed; None if there is no such file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: a name with a zero byte
        return None
    return found.st_size, found.st_mtime_ns


def read_entry(kind: str, key: str) -> Any:
    """Read what ``write_entry`` wrote under this key; None if there is nothing."""
    try:
        entry = json.loads(_place(kind, key).read_bytes())
        return entry["content"] if entry["version"] == VERSION and entry["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def write_entry(kind: str, key: str, content: Any) -> None:
    """Write something of json's types under a key, and forget the oldest entries of the same kind."""
    write_text(kind, key, to_json({"version": VERSION, "key": key, "content": content}))


def write_text(kind: str, key: str, text: str, *, suffix: str = ".json") -> Path | None:
    """Write a file of the cache, and delete the oldest ones of its kind; return None if it cannot be written."""
    place = _place(kind, key, suffix)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, text)
        _prune(place.parent)
    except OSError:
        return None
    return place


def _prune(folder: Path) -> None:
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    for entry in sorted(entries, key=lambda entry: entry.stat().st_mtime_ns)[:-KEPT]:
        entry.unlink(missing_ok=True)


def _place(kind: str, key: str, suffix: str = ".json") -> Path:
    name = re.sub(r"[^\w.-]+", "_", os.path.basename(key))[-40:]
    return cache_folder() / kind / f"{name}-{hashlib.sha256(os.fsencode(key)).hexdigest()[:16]}{suffix}"


class FileFacts:
    """The facts of many files below one folder, each kept as long as size and time of its file stay the same.

    Args:
        kind: the kind of the facts, as ``"images"``.
        root: the folder.
    """

    def __init__(self, kind: str, root: str) -> None:
        self.kind, self.key, self._changed = kind, os.path.abspath(root), False
        entry = read_entry(kind, self.key)
        self._facts: dict[str, Any] = entry if isinstance(entry, dict) else {}

    def get(self, path: str, state: State | None) -> Any:
        """Return the facts of a file in this state; None if they are not known."""
        entry: Any = self._facts.get(path)
        known = isinstance(entry, list) and len(entry) == 3 and state is not None and entry[:2] == [*state]
        return entry[2] if known else None

    def put(self, path: str, state: State | None, facts: Any) -> None:
        """Keep the facts of a file."""
        if state is not None:
            self._facts[path], self._changed = [*state, facts], True

    def save(self) -> None:
        """Write the cache, if something is new."""
        if self._changed:
            write_entry(self.kind, self.key, self._facts)
