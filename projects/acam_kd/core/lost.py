"""The end of a process that a run depends on, in one line: a data loader's worker, or another process of the run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import RunError

__all__ = ["lost_process", "lost_processes"]

WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) (?:exited unexpectedly|is killed by signal: (\w+))")
PARTNER = re.compile(r"gloo|NCCL|[Cc]onnection (?:closed|reset|refused)|Broken pipe|[Ss]ocket")


def lost_process(error: BaseException) -> RunError | None:
    """Return one line in place of torch's error about a process that has ended; None for any other error."""
    if not isinstance(error, RuntimeError) or isinstance(error, RunError):
        return None
    if found := WORKER.search(str(error)):
        how = f" ({found[1]})" if found[1] else ""
        return RunError(
            f"a process that reads images has ended{how}",
            remedy="use fewer workers or smaller batches if memory ran out; then {resume} resumes the run",
        )
    if PARTNER.search(str(error)):
        return RunError(
            "another process of the run has ended, or cannot be reached",
            remedy="see what it said, or what killed it; then {resume} resumes the run",
        )
    return None


@contextmanager
def lost_processes() -> Iterator[None]:
    """Turn torch's errors about a process that has ended into one line.

    Raises:
        RunError: instead of them.

    Example:
        >>> with lost_processes():
        ...     raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
        Traceback (most recent call last):
        ...
        acam_kd.core.errors.RunError: a process that reads images has ended (Killed); use fewer workers or smaller \
batches if memory ran out; then resume resumes the run
    """
    try:
        yield
    except RuntimeError as error:
        if found := lost_process(error):
            raise found from error
        raise
