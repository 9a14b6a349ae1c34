"""Folders with odd names, links as folders, another locale, a clock that jumps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest

from acam_kd import lock as module
from acam_kd.core.errors import ConfigError
from acam_kd.data import shapes
from acam_kd.lock import Lock

NAME = "a b 'c' \"d\" $(touch x) ; é 漢字 %s {taps}"


@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_names_with_blanks_quotes_and_other_scripts(tmp_path, monkeypatch, locale):
    """Also where the locale knows ASCII alone."""
    monkeypatch.setattr(shapes, "SPLITS", {"train": 2, "val": 1})
    data = shapes.make_shapes(tmp_path / NAME, size=64)
    here, fixed = tmp_path / "here", tmp_path / NAME / "fixed.json"
    here.mkdir()
    environment = {
        **os.environ,
        **locale,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "ACAM_KD_CACHE": str(tmp_path / NAME),
    }
    words = [sys.executable, "-m", "acam_kd.cli", "check", str(data), "--fix", str(fixed)]
    done = subprocess.run(words, env=environment, cwd=here, capture_output=True, timeout=300)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert json.loads(fixed.with_stem("fixed_train").read_text())["images"]
    assert not os.listdir(here)
    os.unlink(data / "train.json"), os.unlink(data / "val.json")
    done = subprocess.run(words, env=environment, cwd=here, capture_output=True, timeout=300)
    assert done.returncode == 1 and b"Traceback" not in done.stderr, done.stderr


def test_links_to_one_folder_have_one_owner(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with Lock(tmp_path / "link"):
        assert (tmp_path / "real/run.lock").is_file()
        with pytest.raises(ConfigError, match="another run is at work"), Lock(tmp_path / "real"):
            pass
    assert (tmp_path / "link").is_symlink() and not os.listdir(tmp_path / "real")


@pytest.mark.parametrize("target", ["gone", "loop"])
def test_a_link_that_leads_nowhere_is_one_line(tmp_path, target):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "out").symlink_to(target)
    with pytest.raises(ConfigError, match="which cannot be written"), Lock(tmp_path / "out"):
        pass


@pytest.mark.parametrize("jump", [-86400, 86400, 10 * 365 * 86400])
def test_a_clock_that_jumps_takes_no_lock_away(tmp_path, monkeypatch, jump):
    """An owner on another host is alive if its file changes, whatever time it shows."""
    monkeypatch.setattr(module, "HEARTBEAT", 0.1)
    monkeypatch.setattr(module, "PATIENCE", 3.0)
    path = tmp_path / "run.lock"
    owner = {"user": "u", "host": "elsewhere", "process": 1, "since": "x"}
    path.write_text(json.dumps(owner))
    now = path.stat().st_mtime

    def beat(ended):
        for number in range(100):
            if ended.wait(0.1):
                return
            os.utime(path, (now + jump * number,) * 2)

    ended = threading.Event()
    thread = threading.Thread(target=beat, args=(ended,))
    thread.start()
    try:
        with pytest.raises(ConfigError, match="u on elsewhere, process 1"), Lock(tmp_path):
            pass
    finally:
        ended.set()
        thread.join()
    os.utime(path, (now + 10**9,) * 2)  # a dead owner from the future keeps nobody out
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    with Lock(tmp_path):
        pass
