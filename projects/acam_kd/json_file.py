"""JSON files that a run has written for itself, and that somebody or a full disk may have damaged."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .core.errors import RunError, first_line

__all__ = ["read_json"]


def read_json(path: Path, needed: Iterable[str] = ()) -> dict[str, Any]:
    """Read an object of JSON.

    Args:
        path: the file.
        needed: keys that it must have.

    Raises:
        RunError: it cannot be read, is no object, or lacks a key.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"it cannot be read ({first_line(error)})", str(path), "restore it, or start anew") from error
    if not isinstance(content, dict) or (missing := [key for key in needed if key not in content]):
        lacks = f" (it lacks {', '.join(missing)})" if isinstance(content, dict) else ""
        raise RunError(f"it is no file of acam-kd{lacks}", str(path), "restore it, or start anew")
    return content
