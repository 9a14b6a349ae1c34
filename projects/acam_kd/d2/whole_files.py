"""Checkpoints of Detectron2 that are written completely or not at all, and say in one line when they cannot be."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer

from ..core.errors import RunError, first_line
from ..files import whole_file

__all__ = ["write_safely"]


class _WholeFiles:
    """Detectron2's path manager, whose files get their names when they are complete.

    Detectron2 writes into the named file itself, so that a process that is killed leaves half of one.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def open(self, path: str, mode: str = "r", **more: Any) -> Any:
        """Open a file; one that is written appears when it is closed without an error."""
        if "w" not in mode or "://" in path:
            return self.inner.open(path, mode, **more)
        return whole_file(path, mode)


def write_safely(checkpointer: DetectionCheckpointer) -> None:
    """Let a checkpointer write whole files, and raise RunError where it cannot.

    Args:
        checkpointer: is changed.
    """
    checkpointer.path_manager = _WholeFiles(checkpointer.path_manager)
    checkpointer.save = partial(_save, checkpointer)


def _save(checkpointer: DetectionCheckpointer, name: str, **more: Any) -> None:
    try:
        type(checkpointer).save(checkpointer, name, **more)
    except (OSError, RuntimeError) as error:  # torch's own writer wraps the system's error
        cause: BaseException = error
        while not isinstance(cause, OSError) and (inner := cause.__cause__ or cause.__context__):
            cause = inner
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else first_line(error)
        raise RunError(
            f"writing failed ({reason})", os.path.join(checkpointer.save_dir, f"{name}.pth"),
            "make room on the disk, or make the folder writable; then --resume resumes the run",
        ) from error  # fmt: skip
