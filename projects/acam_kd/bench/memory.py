"""Peak memory, and processes of their own to measure it in."""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["OUT_OF_MEMORY", "in_own_process", "is_out_of_memory", "naive_gib", "peak_memory", "start_peak_memory"]

OUT_OF_MEMORY = "out of memory"
KILLED = -9
STATUS = Path("/proc/self/status")
NAIVE_COPIES = 4
"""Matrices of all pairs of positions that exist at once, in the backward; so it was measured on a CPU."""


def naive_gib(batch: int, positions: int) -> float:
    """What the materialised attention of a level needs, with its backward, in float32."""
    return batch * positions**2 * 4 * NAIVE_COPIES / 2**30


def peak_memory(on_gpu: bool) -> int:
    """The most bytes that were allocated on the GPU, or that this process had in memory.

    Not ``ru_maxrss`` where the system says more: that of a child begins with the parent's, however the child is
    started, and so a large parent would hide what its children need.
    """
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    lines = STATUS.read_text().splitlines() if STATUS.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def start_peak_memory(on_gpu: bool) -> int:
    """Forget the peak up to now, as far as the system lets us; returns the peak from which it begins."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(on_gpu)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory left; on a CPU torch has no type for that."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def in_own_process(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """What a function of a module returns in a new process, or ``{"failed": "out of memory"}``.

    Raises:
        RuntimeError: the process failed otherwise; it has printed its traceback.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, *args))
    process.start()
    sender.close()
    try:
        found: dict[str, Any] = receiver.recv()
    except EOFError:
        found = {}
    process.join()
    if process.exitcode == KILLED:  # as systems do that have no memory left
        return {"failed": OUT_OF_MEMORY}
    if process.exitcode or not found:
        raise RuntimeError(f"{function.__name__} failed in its process, with exit code {process.exitcode}")
    return found


def _send(sender: Any, function: Callable[..., dict[str, Any]], *args: Any) -> None:
    try:
        found = function(*args)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        found = {"failed": OUT_OF_MEMORY}
    sender.send(found)
