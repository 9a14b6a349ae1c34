"""Runs of both engines that end at a random moment, or whose helpers do; resumed, they are the uninterrupted run.

``ACAM_KD_KILLS=20`` tries more moments, ``ACAM_KD_FUZZ_SEED`` others.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ..tv.conftest import data  # noqa: F401 - a fixture
from ..tv.test_lost_nothing import SERVER, command, start, wait_for  # noqa: F401 - start is a fixture
from ..tv.test_training import same, student_of
from .limits import SEED

KILLS = int(os.environ.get("ACAM_KD_KILLS", "3"))
SERVER.set_forkserver_preload(["acam_kd.cli", "acam_kd.tv.training", "tests.robustness.detectron2_run"])
COMMON = ["--iterations", 6, "--checkpoint-period", 1, "--eval-period", 4]
LONG = ["--iterations", 4000, "--checkpoint-period", 1]


def moments(longest: float) -> list[float]:
    """Return random times before the end of a run."""
    draw = random.Random(SEED)
    return [draw.uniform(0, longest) for _ in range(KILLS)]


def whole_run(process) -> float:
    """Wait for the end of a run that nobody ends; return its time."""
    began = time.monotonic()
    process.join(600)
    assert process.exitcode == 0, process.log.read_text()
    return time.monotonic() - began


def end_at(process, moment: float, number: int) -> int | None:
    """End a process after some time; return its status."""
    process.join(moment)
    if process.is_alive():
        os.kill(process.pid, number)
    process.join(600)
    return process.exitcode


def never_half(folder: Path, names: tuple[str, ...]) -> None:
    """Check that each file of tensors that is there can be read, and each line of metrics but the last is JSON."""
    for name in names:
        for path in folder.glob(name):
            torch.load(path, weights_only=True)
    for path in folder.glob("metrics.json*"):
        [json.loads(line) for line in path.read_text().splitlines()[:-1]]
    for path in folder.glob("*.json"):
        if path.name != "metrics.json":
            json.loads(path.read_text())


@pytest.mark.slow
def test_torchvisions_engine_killed_at_random_moments(data, tmp_path, start):  # noqa: F811
    whole, ends = tmp_path / "whole", []
    longest = whole_run(start(command(data, whole, *COMMON)))
    for number, moment in enumerate(moments(longest)):
        out = tmp_path / f"run{number}"
        ends.append(end_at(start(command(data, out, *COMMON)), moment, signal.SIGKILL))
        never_half(out, ("*.pth", "*.ckpt"))
        whole_run(start(command(data, out, *COMMON, "--resume")))
        assert same(student_of(out), student_of(whole))
        results = [json.loads((folder / "result.json").read_text())["metrics"] for folder in (out, whole)]
        assert results[0] == results[1]
    print(f"torchvision: {ends.count(-signal.SIGKILL)} of {len(ends)} killed within {longest:.0f} s, all equal")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_detectron2s_engine_ended_at_random_moments(tmp_path, number, data):  # noqa: F811
    pytest.importorskip("detectron2")
    from . import detectron2_run

    whole, ends = tmp_path / "whole", []
    arguments = detectron2_run.files(tmp_path, data)

    def started(out):
        log = tmp_path / f"{out.name}.log"
        process = SERVER.Process(target=detectron2_run.run, args=(log, [*arguments, "OUTPUT_DIR", str(out)]))
        process.log = log
        process.start()
        return process

    longest = whole_run(started(whole))
    tries = moments(longest) if number == signal.SIGKILL else moments(longest)[:1]
    for index, moment in enumerate(tries):
        out = tmp_path / f"run{index}"
        ends.append(end_at(started(out), moment, number))
        never_half(out, ("*.pth",))
        whole_run(started(out))
        found, expected = (torch.load(f / "model_final.pth", weights_only=True)["model"] for f in (out, whole))
        assert all(found[key].equal(value) for key, value in expected.items())
    print(f"Detectron2: {len([end for end in ends if end])} of {len(ends)} ended by {number} within {longest:.0f} s")


# Helpers that end.


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def of_the_run(text: str) -> list[str]:
    """Return the lines of tracebacks that name a file of ours.

    At the end torch's other worker may print a traceback of its own, which the run cannot prevent.
    """
    return [line for line in text.splitlines() if line.lstrip().startswith('File "') and "acam_kd/" in line]


@pytest.mark.slow
def test_a_killed_worker_of_torchvisions_engine_is_one_line(data, tmp_path, start):  # noqa: F811
    out = tmp_path / "run"
    process = start(command(data, out, *LONG, "--workers", 2))
    wait_for(process, lambda: (out / "last.ckpt").is_file())
    os.kill(children(process.pid)[0], signal.SIGKILL)
    process.join(240)
    text = process.log.read_text()
    step = torch.load(out / "last.ckpt", weights_only=True)["global_step"]
    last = text.splitlines()[-1]
    assert process.exitcode == 1 and not of_the_run(text), text[-3000:]
    assert last.startswith("acam-kd: a process that reads images has ended") and last.endswith(
        "--resume resumes the run"
    )
    assert f"last.ckpt holds step {step} of 4000" in text


@pytest.mark.slow
def test_of_two_processes_one_is_killed(data, tmp_path):  # noqa: F811
    """The other one ends with a line, and the run resumes."""
    out, log = tmp_path / "run", tmp_path / "log"
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }

    def started(*more):
        words = [sys.executable, "-m", "acam_kd.cli", *command(data, out, "--devices", 2, *more)]
        with open(log, "a") as file:
            return subprocess.Popen(words, env=environment, stdout=file, stderr=file, start_new_session=True)

    process = started(*LONG)
    try:
        until = time.monotonic() + 400
        while not (out / "last.ckpt").is_file():
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        os.kill(children(process.pid)[0], signal.SIGKILL)
        assert process.wait(240) == 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    text = log.read_text()
    line = "acam-kd: another process of the run has ended, or cannot be reached; see what it said"
    assert line in text and "Traceback" not in text, text[-3000:]
    step = torch.load(out / "last.ckpt", weights_only=True)["global_step"]
    settings = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps({**settings, "iterations": step + 1}))
    done = started("--iterations", step + 1, "--checkpoint-period", 1, "--resume")
    assert done.wait(400) == 0, log.read_text()[-3000:]
    assert f"resuming after step {step} of {step + 1}" in log.read_text()
