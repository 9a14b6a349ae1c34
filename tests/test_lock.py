"""A folder has one owner at a time, and a dead owner keeps nobody out."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal

import pytest

from acam_kd import lock as module
from acam_kd.core.errors import ConfigError
from acam_kd.lock import NAME, Lock, Owner

SPAWN = multiprocessing.get_context("fork")


def hold(folder, held, release):
    with Lock(folder):
        held.set()
        release.wait(60)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path/run; it is killed at the end, if it is still there."""
    held, release = SPAWN.Event(), SPAWN.Event()
    process = SPAWN.Process(target=hold, args=(tmp_path / "run", held, release))
    process.start()
    assert held.wait(60)
    process.release = release
    yield process
    process.kill()
    process.join()


def refused(folder):
    with pytest.raises(ConfigError) as error, Lock(folder):
        pass
    assert error.value.argument == "output" and "\n" not in str(error.value)
    return str(error.value)


def test_a_live_owner_is_named_and_kept(tmp_path, holder):
    owner = json.loads((tmp_path / "run" / NAME).read_text())
    assert owner["process"] == holder.pid and owner["host"] == os.uname().nodename and owner["user"]
    for _ in range(2):  # a refusal leaves the lock as it is
        message = refused(tmp_path / "run")
        assert f"{owner['user']} on {owner['host']}, process {holder.pid}, since {owner['since']}" in message
    holder.release.set()
    holder.join(60)
    assert not (tmp_path / "run").exists()
    with Lock(tmp_path / "run"):
        pass


def test_a_killed_owner_is_taken_over_with_a_word(tmp_path, holder, caplog):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(60)
    with Lock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / NAME).read_text())["process"] == os.getpid()
    assert f"process {holder.pid}" in caplog.text and "taking over" in caplog.text


def test_the_same_process_is_refused_too(tmp_path):
    (tmp_path / "run").mkdir()
    with Lock(tmp_path / "run"):
        assert str(os.getpid()) in refused(tmp_path / "run")
        (tmp_path / "link").symlink_to(tmp_path / "run")
        assert str(os.getpid()) in refused(tmp_path / "link")
    with Lock(tmp_path / "link"):
        (tmp_path / "run/a file").touch()
    assert os.listdir(tmp_path / "run") == ["a file"]


@pytest.mark.parametrize("alive", [True, False])
def test_the_heartbeat_decides_for_another_host(tmp_path, monkeypatch, caplog, alive):
    """Its kernel may not share its locks with ours."""
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    monkeypatch.setattr(module, "HEARTBEAT", 0.05)
    path = tmp_path / NAME
    path.write_text(json.dumps({"user": "ada", "host": "elsewhere", "process": 7, "since": "noon"}))
    if not alive:
        with Lock(tmp_path):
            pass
        assert "taking over from ada on elsewhere, process 7, since noon" in caplog.text and not path.exists()
        return
    sleep = module.time.sleep
    monkeypatch.setattr(module.time, "sleep", lambda seconds: (sleep(seconds), os.utime(path)))
    assert "ada on elsewhere, process 7" in refused(tmp_path)
    assert json.loads(path.read_text())["host"] == "elsewhere"


def test_the_heartbeat_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT", 0.02)
    with Lock(tmp_path) as lock:
        os.utime(lock.path, (1, 1))
        for _ in range(500):
            if lock.path.stat().st_mtime > 1:
                break
            module.time.sleep(0.01)
        assert lock.path.stat().st_mtime > 1


@pytest.mark.parametrize("content", ["", "half a {", "[1, 2]", '{"user": "ada"}'])
def test_a_lock_without_an_owner_keeps_nobody_out(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    with Lock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()


def test_a_file_system_without_locks_has_the_heartbeat(tmp_path, monkeypatch):
    def without(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(module.fcntl, "lockf", without)
    monkeypatch.setattr(module, "PATIENCE", 1.0)
    monkeypatch.setattr(module, "HEARTBEAT", 0.1)
    owner = Owner.this()
    path = tmp_path / NAME
    path.write_text(json.dumps({**owner.__dict__, "process": 1}))
    sleep = module.time.sleep
    monkeypatch.setattr(module.time, "sleep", lambda seconds: (sleep(seconds), os.utime(path)))
    assert f"on {owner.host}, process 1" in refused(tmp_path)


def test_folders_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("a file")
    assert "file, which cannot be written (File exists)" in refused(tmp_path / "file")
    assert "which cannot be written (Not a directory)" in refused(tmp_path / "file/run")
    with pytest.raises(ValueError, match="something else"), Lock(tmp_path / "a/b"):
        raise ValueError("something else")
    assert not (tmp_path / "a").exists()
