"""Inputs that are tried in a process of their own, with a limit on memory and on time."""

from __future__ import annotations

import os
import resource
import signal
import traceback
from pathlib import Path

import pytest

MEMORY = 2 << 30
"""Bytes that an input may take beside what the process has already."""
SECONDS = 60
"""Time for one input."""
INPUTS = int(os.environ.get("ACAM_KD_FUZZ", "200"))
"""Inputs of all the fuzz tests together."""
SEED = int(os.environ.get("ACAM_KD_FUZZ_SEED", "0"))


class Hung(BaseException):
    """An input that takes too long; no ``except Exception`` swallows it."""


def hang(*_):
    raise Hung(f"more than {SECONDS} s")


def in_child(function, folder: Path) -> None:
    """Run a function in a forked process under the limits; fail with its traceback, or with the signal that ended it."""
    said = folder / "traceback.txt"
    child = os.fork()
    if not child:
        status = 1
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            signal.signal(signal.SIGALRM, hang)
            function()
            status = 0
        except BaseException:
            said.write_text(traceback.format_exc())
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        pytest.fail(f"the process was killed by signal {os.WTERMSIG(status)}; its last input lies in {folder}")
    if status:
        pytest.fail(said.read_text())
