"""A file that one of several processes makes: real processes, one of which may die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from acam_kd.core.errors import RunError
from acam_kd.files import write_atomically
from acam_kd.methods.parts import shared_file
from acam_kd.methods.parts.shared_file import make_once

MAKER = """
import sys, time
from pathlib import Path
from acam_kd import files
from acam_kd.methods.parts import shared_file
shared_file.HEARTBEAT = shared_file.POLL = 0.05
path = Path(sys.argv[1])
def make():
    print("making", flush=True)
    while not Path(sys.argv[2]).exists():
        time.sleep(0.05)
    files.write_atomically(path, sys.argv[3])
shared_file.make_once(path, make, waiting=lambda: print("waiting", flush=True))
print("there", flush=True)
"""


@pytest.fixture
def start(tmp_path):
    """Start a process that makes a file once a gate is there, or waits for it; return it and its first line."""
    started = []

    def start(path, gate, content):
        command = [sys.executable, "-c", MAKER, str(path), str(gate), content]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def quick(monkeypatch):
    for name, seconds in (("POLL", 0.05), ("HEARTBEAT", 0.05), ("PATIENCE", 1.0)):
        monkeypatch.setattr(shared_file, name, seconds)


def never():
    pytest.fail("this process must not make the file")


def test_a_file_is_made_if_it_is_not_there(tmp_path, quick):
    path = tmp_path / "new" / "file"
    make_once(path, lambda: write_atomically(path, "one"))
    make_once(path, never)
    assert os.listdir(path.parent) == ["file"] and path.read_text() == "one"


@pytest.mark.slow
def test_one_process_makes_it_and_the_others_wait(tmp_path, start, quick):
    path, gate, calls = tmp_path / "folder" / "file", tmp_path / "gate", []
    maker, line = start(path, gate, "first")
    other, other_line = start(path, gate, "second")
    assert (line, other_line) == ("making", "waiting")
    timer = threading.Timer(1.5, gate.touch)  # the patience ends before
    timer.start()
    make_once(path, never, first=False, waiting=lambda: calls.append(1))
    timer.join()
    assert path.read_text() == "first" and calls == [1]
    assert other.wait() == 0 == maker.wait() and other.stdout.read() == "there\n"
    assert os.listdir(path.parent) == ["file"]


def test_a_process_that_dies_is_noticed_and_replaced(tmp_path, start, quick):
    path = tmp_path / "file"
    maker, _ = start(path, tmp_path / "gate", "first")
    os.kill(maker.pid, signal.SIGKILL)
    maker.wait()
    with pytest.raises(RunError) as error:
        make_once(path, never, first=False)
    assert error.value.where == str(path) and "no sign of life for 1 s" in error.value.what
    make_once(path, lambda: write_atomically(path, "second"))
    assert path.read_text() == "second" and os.listdir(tmp_path) == ["file"]


def test_a_process_whose_work_fails_leaves_the_place_to_another(tmp_path, quick):
    path = tmp_path / "file"
    with pytest.raises(ZeroDivisionError):
        make_once(path, lambda: 1 / 0)
    assert os.listdir(tmp_path) == []
    with pytest.raises(RunError):
        make_once(path, never, first=False)
    make_once(path, lambda: write_atomically(path, "second"))
    assert path.read_text() == "second"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(RunError) as error:
        make_once(tmp_path / "file" / "x", never)
    assert "cannot be written (" in error.value.what and error.value.where == str(tmp_path / "file" / "x")


def test_reports_come_once_a_minute(tmp_path, monkeypatch):
    """By a clock that each sleep moves on by five seconds; a sign of life comes every minute."""
    now, calls, path = [0.0], [], tmp_path / "file"

    def sleep(_):
        now[0] += 5
        if now[0] % 60 == 0:
            lock = tmp_path / "file.lock"
            lock.touch()
            os.utime(lock, ns=(int(now[0]), int(now[0])))
        if now[0] == 600:
            path.write_text("x")

    monkeypatch.setattr(shared_file, "time", type("Clock", (), {"monotonic": lambda: now[0], "sleep": sleep}))
    make_once(path, never, first=False, waiting=lambda: calls.append(now[0]))
    assert calls == [60.0 * minute for minute in range(10)]
