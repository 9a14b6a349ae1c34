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
        "rows": {
            "student alone": ["--method", "none", "--inherit", "never"],
            "mimicking": ["--method", "Mimic", "--set", "features=raw"],
        },
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"settings": {"toy": content}}, sort_keys=False))
    command = [sys.executable, "-m", "acam_kd.cli", "compare", "--plan", str(tmp_path / "plan.yaml"), "--seeds", "1"]
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

    content["rows"] |= {
        "twice": ["--method", "Mimic", "--set", "features=raw", "alpha=2"],
        "classes": ["--method", "NKD"],
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"settings": {"toy": content}}, sort_keys=False))
    command = [sys.executable, "-m", "benchmarks.match_weights", "--plan", str(tmp_path / "plan.yaml"), "--ratio", "3"]
    command += ["--output", str(tmp_path / "out"), "--warmup", "1", "--steps", "1"]
    # Rows are measured on the student of seed 0, where the comparison was of seed 1.
    (tmp_path / "out/toy/student_alone_seed0").symlink_to(tmp_path / "out/toy/student_alone_seed1")
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    found = {row: [float(cell) for cell in cells] for row, *cells in lines[1:]}
    assert list(found) == ["mimicking", "twice", "classes"]
    assert found["mimicking"][2] == 1 and found["twice"][2] == pytest.approx(0.5, rel=0.1)
    for gradient, _, factor, loss, task, times in found.values():
        assert factor == pytest.approx(found["mimicking"][0] / gradient, rel=0.02)
        assert loss > 0 and times == pytest.approx(3 * task / loss, rel=0.02)
