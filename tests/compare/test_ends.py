"""The tool ends, or is killed, while a run is at work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import ROOT, STUB, starts


def started(plan, tmp_path, *more):
    """Start the tool as a process of its own, and wait until its slow run has started."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import runpy\nfrom acam_kd import compare\ncompare.COMMANDS['torchvision'] = {STUB!r}\n"
        "runpy.run_module('acam_kd.cli', run_name='__main__')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "projects"), str(ROOT)])}
    command = [
        sys.executable,
        str(driver),
        "compare",
        "--plan",
        str(plan),
        "--output",
        str(tmp_path / "out"),
        "--seeds",
        "0",
        *more,
    ]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (tmp_path / "out/toy/slow_seed0/starts").is_file():
        assert time.monotonic() < until and process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process


def alive(pattern):
    """Return whether a process has this pattern in its command line."""
    commands = (path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists())
    return any(pattern.encode() in command for command in commands)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end_it_ends_its_runs_and_goes_on_later(plan, run, tmp_path, number):
    path = plan(rows={"student alone": [], "slow": ["--wait-for", str(tmp_path / "go")]})
    process = started(path, tmp_path)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1 and err.strip() == "acam-kd: interrupted; the same command resumes it"
    assert not alive(str(tmp_path / "go"))
    (tmp_path / "go").touch()
    status, records = run(path, "--seeds", 0)
    assert status == 0 and [r["row"] for r in records] == ["student alone", "slow"]
    assert len(starts(tmp_path / "out/toy/student_alone_seed0")) == 1
    assert len(starts(tmp_path / "out/toy/slow_seed0")) == 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at /proc")
def test_killed_it_leaves_its_run_alone_and_waits_for_it_later(plan, run, tmp_path, capsys):
    path = plan(rows={"slow": ["--wait-for", str(tmp_path / "go")], "student alone": []})
    process = started(path, tmp_path)
    process.kill()
    process.communicate()
    assert alive(str(tmp_path / "go"))
    again = started(path, tmp_path)
    assert "waiting for the process" in again.stdout.readline()
    assert len(starts(tmp_path / "out/toy/slow_seed0")) == 1
    (tmp_path / "go").touch()
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, (out, err)
    _, records = run(path, "--seeds", 0)
    assert [r["row"] for r in records] == ["slow", "student alone"]
    assert records[0]["peak_rss_gib"] is None and records[1]["peak_rss_gib"] > 0
