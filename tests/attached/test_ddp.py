"""Two processes with DistributedDataParallel, without find_unused_parameters."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "static", "period", "unlabelled"])
def test_two_processes_stay_in_step(kind, root):
    port, environment = free_port(), {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root / "projects")}
    command = [sys.executable, str(root / "tests" / "ddp_worker.py")]
    workers = [
        subprocess.Popen(
            [*command, str(rank), kind, port], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(2)
    ]
    for worker in workers:
        output, _ = worker.communicate(timeout=120)
        assert worker.returncode == 0 and b"in step" in output, output.decode()[-2000:]
