"""Peak memory, and new processes to measure it in."""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from acam_kd.core.errors import RunError

__all__ = ["OUT_OF_MEMORY", "in_own_process", "is_out_of_memory", "naive_gib", "peak_memory", "start_peak_memory"]

OUT_OF_MEMORY = "out of memory"
KILLED = -9
STATUS = Path("/proc/self/status")
NAIVE_COPIES = 4
"""The number of matrices of all pairs of positions that exist at once in the backward, as measured on a CPU."""


def naive_gib(batch: int, positions: int) -> float:
    """Estimate the memory of the materialised attention of a level, with its backward, in float32."""
    return batch * positions**2 * 4 * NAIVE_COPIES / 2**30


def peak_memory(on_gpu: bool) -> int:
    """Return the largest number of bytes that were allocated on the GPU, or that this process had in memory.

    ``ru_maxrss`` is only the fallback. A child's begins with its parent's, however the child is started, so a large
    parent would hide the need of its children.
    """
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    lines = STATUS.read_text().splitlines() if STATUS.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def start_peak_memory(on_gpu: bool) -> int:
    """Forget the peak so far, where the system allows that, and return the peak that counting starts from."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(on_gpu)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that no memory was left; on a CPU torch has no type for that."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def in_own_process(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Call a function of a module in a new process and return its result, or ``{"failed": "out of memory"}``.

    Raises:
        RunError: the process failed for another reason; it has printed its traceback.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, *args))
    process.start()
    sender.close()
    try:
        result: dict[str, Any] = receiver.recv()
    except EOFError:
        result = {}
    process.join()
    if process.exitcode == KILLED:  # systems without memory left do that
        return {"failed": OUT_OF_MEMORY}
    if process.exitcode or not result:
        raise RunError(
            f"{function.__name__} failed in its process, with exit code {process.exitcode}",
            remedy="its traceback is above",
        )
    return result


def _send(sender: Any, function: Callable[..., dict[str, Any]], *args: Any) -> None:
    try:
        result = function(*args)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        result = {"failed": OUT_OF_MEMORY}
    sender.send(result)
