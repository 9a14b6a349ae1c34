"""The comparison with torchvision's models: the real commands, two steps each."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml

from .conftest import STUDENT


@pytest.mark.slow
def test_two_rows_and_their_teacher(data, root, tmp_path):
    common = ["--data", str(data), "--student", STUDENT, "--size", 64, "--batch-size", 2, "--workers", 0]
    common += ["--accelerator", "cpu", "--checkpoint-period", 10]
    content = {
        "engine": "torchvision",
        "teacher": [*common, "--iterations", 1],
        "run": [*common, "--iterations", 40, "--eval-period", 100, "--teacher", "{teacher}"],
        "metrics": ["AP", "AP50"],
        "mimicking": "mimicking",
        "rows": {"student alone": ["--method", "none", "--inherit", "never"], "mimicking": ["--method", "Mimic"]},
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"settings": {"toy": content}}, sort_keys=False))
    command = [sys.executable, "tools/compare.py", "--plan", str(tmp_path / "plan.yaml"), "--seeds", "1"]
    command += ["--output", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(root / "projects")}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [(r["row"], r["seed"], r["iterations"]) for r in records] == [
        *(("teacher", 0, 1), ("student alone", 1, 40), ("mimicking", 1, 40))
    ]
    assert records[1]["distillation_to_task"] is None and records[2]["distillation_to_task"] > 0
    assert all(r["seconds_per_step"] > 0 and 0.1 < r["peak_rss_gib"] < 20 for r in records)
    assert [r["seconds_per_step_is"] for r in records] == ["total", "median", "median"]
    assert "| mimicking |" in done.stdout
