"""The tool, with a stub for its runs."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
import yaml

from acam_kd import cli, compare

STUB = [sys.executable, str(Path(__file__).parent / "stub.py")]
ROOT = Path(__file__).resolve().parents[2]
TUNING = {"seed": 100, "run": ["--val", "other"], "rows": {"better": [["--ap", 30], ["--ap", 50], ["--ap", 50.0]]}}


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Return a function that writes a plan of two rows, whose runs are the stub's."""
    monkeypatch.setitem(compare.COMMANDS, "torchvision", STUB)

    def write(**change):
        content = {
            "engine": "torchvision",
            "run": ["--iterations", 100],
            "metrics": ["AP"],
            "rows": {"student alone": [], "better": ["--ap", 20, "--ratio", 4]},
            **change,
        }
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump({"settings": {"toy": content}}, sort_keys=False))
        return path

    return write


@pytest.fixture
def run(tmp_path):
    """Return a function that runs the tool and returns its status and its records."""

    def call(plan, *more):
        before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
        status = 0
        try:
            cli.main(["compare", "--plan", str(plan), "--output", str(tmp_path / "out"), *map(str, more)])
        except SystemExit as stop:
            status = stop.code
        assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
        path = tmp_path / "out/results.jsonl"
        return status, [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    return call


def starts(folder):
    return (folder / "starts").read_text().splitlines()
