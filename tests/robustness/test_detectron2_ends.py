"""Detectron2 runs with a loader and with two processes, whose parts end, or which a scheduler ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from ..tv.conftest import data  # noqa: F401 - a fixture
from ..tv.test_lost_nothing import begun, killed_at_the_end, wait_for
from . import detectron2_run
from .test_ends import children, of_the_run

ROOT = Path(__file__).resolve().parent.parent.parent
LONG = ["SOLVER.MAX_ITER", "4000", "SOLVER.STEPS", "()"]


@pytest.fixture
def arguments(tmp_path, data):  # noqa: F811
    """Makes the arguments of a tiny run in ``tmp_path / "run"``; more KEY VALUE pairs as arguments."""
    common = detectron2_run.files(tmp_path, data)
    return lambda *opts: [*common, "OUTPUT_DIR", str(tmp_path / "run"), *map(str, opts)]


@pytest.fixture
def start(tmp_path):
    """Start a run with the config's loader; it is killed at the end of the test if it still runs."""
    with killed_at_the_end() as processes:
        yield lambda words: begun(processes, tmp_path / "log", detectron2_run.run, words, False)


def last(out):
    """Return the last checkpoint's file and its steps."""
    path = out / (out / "last_checkpoint").read_text()
    return path, torch.load(path, weights_only=False)["iteration"] + 1


def resumed(start, arguments, out, step):
    """Check that one more step can be done after those of a run."""
    process = start(arguments("SOLVER.MAX_ITER", step + 1, "SOLVER.STEPS", "()"))
    process.join(240)
    assert process.exitcode == 0 and f"Starting training from iteration {step}\n" in process.log.read_text()
    assert last(out) == (out / "model_final.pth", step + 1)


@pytest.mark.slow
def test_a_killed_worker_is_one_line(arguments, tmp_path, start):
    out = tmp_path / "run"
    process = start(arguments(*LONG, "DATALOADER.NUM_WORKERS", 2))
    wait_for(process, lambda: (out / "last_checkpoint").is_file())
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    process.join(240)
    text = process.log.read_text()
    line = text.splitlines()[-1]
    assert process.exitcode == 1 and not of_the_run(text), text[-3000:]
    assert line.startswith("train_net.py: a process that reads images has ended"), line
    assert line.endswith("--resume resumes the run")
    path, step = last(out)
    assert f"{path} holds step {step} of 4000" in text
    resumed(start, arguments, out, step)


@pytest.mark.slow
def test_sigterm_to_all_processes_leaves_the_workers_to_their_parent(arguments, tmp_path, start):
    """So do schedulers end a job."""
    out = tmp_path / "run"
    process = start(arguments(*LONG, "DATALOADER.NUM_WORKERS", 2))
    wait_for(process, lambda: (out / "last_checkpoint").is_file())
    for pid in (*children(process.pid), process.pid):
        os.kill(pid, signal.SIGTERM)
    process.join(240)
    text = process.log.read_text()
    path, step = last(out)
    assert process.exitcode == 143 and "Traceback" not in text, text[-3000:]
    line = f"interrupted: {path} holds step {step} of 4000; the same command with --resume resumes there"
    assert text.splitlines()[-1] == f"train_net.py: {line}"
    resumed(start, arguments, out, step)


@contextlib.contextmanager
def two(words, log):
    """Start a run of two processes in a session of its own; all are killed at the end."""
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "tests.robustness.detectron2_two", *words]
    with open(log, "a") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_file(path, process, log):
    until = time.monotonic() + 400
    while not path.is_file():
        assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "all_of_them", "status"), [(signal.SIGTERM, False, 143), (signal.SIGINT, True, 130)]
)
def test_two_processes_stop_after_the_same_step(arguments, tmp_path, start, number, all_of_them, status):
    """A scheduler may signal the first process only; a terminal sends Ctrl-C to each of them."""
    out, log = tmp_path / "run", tmp_path / "two"
    with two(arguments(*LONG, "SOLVER.CHECKPOINT_PERIOD", 5), log) as process:
        wait_for_file(out / "last_checkpoint", process, log)
        (os.killpg if all_of_them else os.kill)(process.pid, number)
        assert process.wait(240) == status, log.read_text()[-3000:]
    text = log.read_text()
    path, step = last(out)
    assert "Traceback" not in text, text[-3000:]
    line = f"train_net.py: interrupted: {path} holds step {step} of 4000; the same command with --resume resumes there"
    assert text.count(line) == 1 and not (out / "run.lock").exists()
    resumed(start, arguments, out, step)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_of_two_processes_one_is_killed(arguments, tmp_path, start, rank):
    """The other one ends with a line, and the run resumes."""
    out, log = tmp_path / "run", tmp_path / "two"
    with two(arguments(*LONG), log) as process:
        wait_for_file(out / "last_checkpoint", process, log)
        ranks = [pid for pid in children(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(ranks) == 2
        os.kill(ranks[rank], signal.SIGKILL)
        assert process.wait(240) == 1
    text = log.read_text()
    assert "Traceback" not in text, text[-3000:]
    assert f"train_net.py: process {rank} of the run was ended by SIGKILL; then --resume resumes the run" in text
    resumed(start, arguments, out, last(out)[1])


@pytest.mark.parametrize("words", [[], ["--eval-only"]], ids=["train", "evaluate"])
def test_a_read_only_mount_is_one_line(arguments, tmp_path, words):
    """Before the first step, and before an evaluation."""
    place = tmp_path / "run"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=8m", "none", str(place)], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        with pytest.raises(SystemExit) as error:
            detectron2_run.train([*words, *arguments()])
        line = f"train_net.py: OUTPUT_DIR: found {place}, which cannot be written (Read-only file system)"
        assert str(error.value).startswith(line)
    finally:
        subprocess.run(["umount", str(place)], check=True)
