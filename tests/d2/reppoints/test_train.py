"""RepPoints by the command: it learns drawn shapes, and is distilled, evaluated and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from ..conftest import ROOT, distillation_config, save_config
from ..running import run
from .conftest import tiny

CLASSES = ["MODEL.REPPOINTS.NUM_CLASSES", 6]


@pytest.fixture
def arguments(data, tmp_path):
    """Makes the command line of a tiny run; more KEY VALUE pairs as arguments."""
    save_config(tiny(*CLASSES, "MODEL.RESNETS.DEPTH", 101), tmp_path / "teacher.yaml")
    cfg = distillation_config(
        tiny(*CLASSES), "teacher.yaml", "DATASETS.TRAIN", "('own_train',)", "DATASETS.TEST", "('own_val',)",
        "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", "(3,)", "SOLVER.BASE_LR", 0.001,
        "SOLVER.CHECKPOINT_PERIOD", 2, "DISTILL.LOG_PERIOD", 2, "SEED", 3, "OUTPUT_DIR", str(tmp_path / "out"),
        "TEST.EVAL_PERIOD", 0,
    )  # fmt: skip
    path = save_config(cfg, tmp_path / "run.yaml")
    return lambda *opts: [
        "--config-file", path, "--dataset", "own_train", str(data / "train.json"), str(data / "train"),
        "--dataset", "own_val", str(data / "val.json"), str(data / "val"), *map(str, opts),
    ]  # fmt: skip


def logged(folder):
    """Name -> the last value that a run wrote."""
    lines = (folder / "out" / "metrics.json").read_text().splitlines()
    return {name: value for line in lines for name, value in json.loads(line).items()}


def test_a_run_is_distilled_evaluated_and_logged(arguments, tmp_path):
    run(arguments("DISTILL.METHOD", "FGD+KD"))
    assert {
        "loss_points_init", "loss_points_refine", "loss_fgd_relation", "loss_kd_kl", "reppoints/positives",
        "reppoints/objects_without_overlap", "bbox/AP",
    } <= set(logged(tmp_path))  # fmt: skip
    state = torch.load(tmp_path / "out" / "model_final.pth")["model"]
    assert "head.moment_transfer" in state and not [name for name in state if name.startswith("distillation")]


@pytest.mark.slow
def test_it_learns_drawn_shapes(arguments, tmp_path):
    """Six images, learnt by heart: AP 33 and AP50 53 where this was written, 0 without learning."""
    run(
        arguments(
            "DISTILL.METHOD", "", "DISTILL.INHERIT", "never", "DATASETS.TEST", "('own_train',)",
            "SOLVER.IMS_PER_BATCH", 6, "SOLVER.MAX_ITER", 120, "SOLVER.STEPS", "()", "SOLVER.BASE_LR", 0.05,
            "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.WARMUP_ITERS", 20, "SOLVER.CHECKPOINT_PERIOD", 1000,
            "DISTILL.MAX_GRADIENT_NORM", 35.0, "MODEL.REPPOINTS.POINT_SCALE", 2,
        )
    )  # fmt: skip
    values = logged(tmp_path)
    assert values["bbox/AP"] > 15 and values["bbox/AP50"] > 25


@pytest.mark.slow
def test_the_instant_config_as_a_command(tmp_path):
    environment = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path / "datasets")}
    command = [sys.executable, "train_net.py", "--config-file", "configs/quick_schedules/acam_reppoints_instant.yaml"]
    done = subprocess.run(
        [*command, "OUTPUT_DIR", str(tmp_path / "out"), "SOLVER.MAX_ITER", "2", "DISTILL.TEACHER.CHECK", "False"],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "copypaste: AP,AP50,AP75,APs,APm,APl" in done.stdout + done.stderr
