"""The end of a process that a run depends on, in one line: a data loader's worker, or another process of the run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb

from .errors import RunError

__all__ = ["lost_process", "lost_processes"]

WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) (?:exited unexpectedly|is killed by signal: (\w+))")
BROKEN = RuntimeError, ConnectionError, EOFError
PARTNER = re.compile(r"gloo|NCCL|[Cc]onnection (?:closed|reset|refused)|Broken pipe|[Ss]ocket")


def lost_process(error: BaseException) -> RunError | None:
    """Return one line in place of torch's error about a process that has ended; None for any other error."""
    if isinstance(error, RunError) or not isinstance(error, BROKEN):
        return None
    found = WORKER.search(str(error))
    if found or _while_reading_a_batch(error):
        how = f" ({found[1]})" if found and found[1] else ""
        return RunError(
            f"a process that reads images has ended{how}",
            remedy="use fewer workers or smaller batches if memory ran out; then {resume} resumes the run",
        )
    if isinstance(error, RuntimeError) and PARTNER.search(str(error)):
        return RunError(
            "another process of the run has ended, or cannot be reached",
            remedy="see what it said, or what killed it; then {resume} resumes the run",
        )
    return None


def _while_reading_a_batch(error: BaseException) -> bool:
    """Tell if a connection broke in torch's data loader: a worker that dies while it hands over a batch."""
    if not isinstance(error, (ConnectionError, EOFError)):
        return False
    modules = {frame.f_globals.get("__name__") for frame, _ in walk_tb(error.__traceback__)}
    return {"torch.utils.data.dataloader", "multiprocessing.connection"} <= modules


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
    except BROKEN as error:
        if found := lost_process(error):
            raise found from error
        raise
