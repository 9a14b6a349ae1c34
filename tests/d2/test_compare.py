"""The comparison with Detectron2: the real commands, a few steps each."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml

from acam_kd.data import shapes

from .conftest import ROOT, detector_config, distillation_config, save_config


@pytest.mark.slow
def test_two_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "SPLITS", {"train": 6, "val": 3})
    data = shapes.make_shapes(tmp_path / "data", size=64)
    student = detector_config("Base-RetinaNet.yaml", "MODEL.RETINANET.NUM_CLASSES", 6)
    save_config(student, tmp_path / "teacher.yaml")
    splits = ["DATASETS.TRAIN", "('cmp_train',)", "DATASETS.TEST", "('cmp_val',)"]
    cfg = distillation_config(
        student, "teacher.yaml", *splits, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", "(3,)",
        "SOLVER.BASE_LR", 0.001, "DISTILL.LOG_PERIOD", 2, "DISTILL.INHERIT", "never",
    )  # fmt: skip
    run = ["--config-file", save_config(cfg, tmp_path / "run.yaml")]
    for split in ("train", "val"):
        run += ["--dataset", f"cmp_{split}", str(data / f"{split}.json"), str(data / split)]
    content = {
        "engine": "detectron2",
        "run": run,
        "metrics": ["bbox/AP", "bbox/AP50"],
        "rows": {"student alone": ["DISTILL.METHOD", ""], "mimicking": ["DISTILL.METHOD", "Mimic"]},
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"settings": {"toy": content}}, sort_keys=False))
    command = [sys.executable, "-m", "acam_kd.cli", "compare", "--plan", str(tmp_path / "plan.yaml"), "--seeds", "1"]
    command += ["--output", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "projects")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "out/results.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["row"], r["seed"], r["iterations"]) for r in records] == [("student alone", 1, 4), ("mimicking", 1, 4)]
    assert records[0]["distillation_to_task"] is None and records[1]["distillation_to_task"] > 0
    assert all(r["seconds_per_step"] > 0 and r["device"] == "CPU" and r["versions"]["detectron2"] for r in records)
    config = yaml.safe_load((tmp_path / "out/toy/mimicking_seed1/config.yaml").read_text())
    assert config["SEED"] == 1 and config["DISTILL"]["METHOD"] == "Mimic"

    # The comparison was killed before the run's evaluation: it resumes there, and trains nothing again.
    path.write_text("")
    folder = tmp_path / "out/toy/mimicking_seed1"
    known = json.loads((folder / "compare.json").read_text())
    (folder / "compare.json").write_text(json.dumps({**known, "complete": False, "peak_rss_gib": None}))
    lines = (folder / "metrics.json").read_text().splitlines()
    (folder / "metrics.json").write_text("\n".join(line for line in lines if "bbox/AP" not in line) + "\n")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert again[0] == records[0] and again[1]["distillation_to_task"] == records[1]["distillation_to_task"]
    assert again[1]["peak_rss_gib"] is None and "bbox/AP" in again[1]["metrics"]
