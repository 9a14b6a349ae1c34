"""train_net.py as a user runs it: training, evaluating, several processes, bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor, DefaultTrainer
from detectron2.modeling import build_model
from detectron2.utils import comm

import train_net
from acam_kd.d2 import (
    add_distillation_config,
    checkpoint_distiller,
    guard_gradients,
    register_coco_datasets,
    student_config,
)

from .conftest import ROOT, broken, detector_config, distillation_config, save_config
from .running import CHEAPER, FixedOrder, run, train


def test_every_checkpoint_is_the_plain_student(arguments, tmp_path):
    """Also that of a killed run; under the student's own config, as train_net wrote it, in stock Detectron2."""
    train(arguments("OUTPUT_DIR", tmp_path / "run"), until=2)
    stock = get_cfg()
    stock.merge_from_file(str(tmp_path / "run" / "student_config.yaml"))
    checkpoint = torch.load(tmp_path / "run" / "model_0000001.pth", weights_only=False)
    missing, unexpected = build_model(stock).load_state_dict(checkpoint["model"], strict=False)
    assert missing == [] and unexpected == []
    assert not [k for part in ("model", "distiller") for k in checkpoint[part] if "teacher" in k]


@pytest.mark.slow
def test_train_then_evaluate_without_a_teacher(arguments, tmp_path, monkeypatch):
    out = tmp_path / "run"
    run(arguments("OUTPUT_DIR", out))
    os.remove(tmp_path / "teacher.yaml")
    evaluated = []
    test = train_net.Trainer.test
    monkeypatch.setattr(train_net.Trainer, "test", lambda cfg, model: evaluated.append(model) or test(cfg, model))
    command = arguments("OUTPUT_DIR", out, "MODEL.WEIGHTS", out / "model_final.pth", flags=["--eval-only"])
    del command[2:6]  # nor the training set
    again = run(command)
    saved = torch.load(out / "model_final.pth", weights_only=False)["model"]
    assert all(torch.equal(v, saved[k]) for k, v in evaluated[0].state_dict().items())
    logged = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert logged[-1]["bbox/AP"] == pytest.approx(again["bbox"]["AP"], nan_ok=True)
    assert any("distill/p3/spatial_dice" in line and "loss_acam_spatial" in line for line in logged)
    assert [f for f in os.listdir(out) if f.startswith("events.out.tfevents")]


@pytest.mark.slow
def test_a_stock_trainer_in_somebody_elses_code(arguments, data, tmp_path):
    """The README's lines, without train_net.py."""
    config = arguments()[1]
    register_coco_datasets([["own_train", str(data / "train.json"), str(data / "train")]])
    cfg = get_cfg()
    add_distillation_config(cfg)
    cfg.merge_from_file(config)
    cfg.DATASETS.TEST, cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER, cfg.OUTPUT_DIR = (), (), 2, str(tmp_path / "run")
    for resume in (False, True):
        cfg.SOLVER.MAX_ITER += 1
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        trainer = DefaultTrainer(cfg)
        checkpoint_distiller(trainer)
        guard_gradients(trainer.optimizer, trainer.model, max_norm=35.0)
        trainer.resume_or_load(resume=resume)
        trainer.train()
    assert trainer.start_iter == 3
    saved = torch.load(tmp_path / "run/model_final.pth", weights_only=False)
    assert all(torch.equal(v, saved["distiller"][k]) for k, v in trainer.model.distillation.state_dict().items())
    student = student_config(cfg)
    student.MODEL.WEIGHTS = str(tmp_path / "run/model_final.pth")
    assert "instances" in DefaultPredictor(student)(np.zeros((64, 64, 3), np.uint8))


@pytest.mark.slow
def test_test_time_augmentation(arguments, rcnn, tmp_path):
    student = rcnn.clone()
    student.MODEL.ROI_HEADS.NUM_CLASSES = 6
    teacher = save_config(student, tmp_path / "t.yaml")
    path = save_config(distillation_config(student, teacher), tmp_path / "run.yaml")
    command = arguments(
        "OUTPUT_DIR",
        tmp_path / "run",
        "TEST.AUG.ENABLED",
        True,
        "TEST.AUG.MIN_SIZES",
        "(64,)",
        "SOLVER.MAX_ITER",
        1,
        "SOLVER.STEPS",
        "()",
    )
    command[1] = path
    command += ["DATASETS.TRAIN", "('own_train',)", "DATASETS.TEST", "('own_val',)", "SOLVER.IMS_PER_BATCH", "2"]
    run(command)
    results = run([*command[:2], "--eval-only", *command[2:], "MODEL.WEIGHTS", str(tmp_path / "run/model_final.pth")])
    assert "bbox_TTA" in results and "bbox" in results


def test_gradients_are_clipped_over_the_whole_model(arguments, tmp_path):
    trainer = train(arguments("OUTPUT_DIR", tmp_path / "a", "DISTILL.MAX_GRADIENT_NORM", 1e-3), until=1)
    grads = [p.grad for p in trainer.model.parameters()]
    assert torch.stack(torch._foreach_norm(grads)).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_a_gradient_that_is_not_finite_stops_before_the_step(arguments, tmp_path):
    args = train_net.parser().parse_args(arguments("OUTPUT_DIR", tmp_path / "a"))
    trainer = train_net.Trainer(train_net.setup(args))
    weight = trainer.model.head.cls_score.weight
    before = weight.clone()
    trainer._trainer.data_loader = FixedOrder(trainer)
    weight.register_hook(lambda grad: grad * float("nan"))
    with broken("the gradient is not finite in head.cls_score.weight", "iteration 0"):
        trainer.train()
    assert torch.equal(weight, before) and not (tmp_path / "a" / "last_checkpoint").exists()


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["DISTILL.METHOD", "DK"], "DISTILL.METHOD: found DK, expected one of ACAMKD, "),
        (["DISTILL.LEVELS", "['p2']"], "DISTILL.LEVELS: found p2, expected levels of the student: p3, "),
        (["DISTILL.TEACHER.CONFIG_FILE", "gone.yaml"], "DISTILL.TEACHER.CONFIG_FILE: found no file "),
        (["DISTILL.TEACHER.WEIGHTS", "gone.pth"], "DISTILL.TEACHER.WEIGHTS: found no file "),
        (
            ["MODEL.RETINANET.NUM_CLASSES", 5],
            "MODEL.RETINANET.NUM_CLASSES: found 5, expected 6, the classes of dataset own_train: plain disc, barred disc, "
            "plain square, barred square, plain triangle, ...",
        ),
        (["DATASETS.TRAIN", "('nowhere',)"], "DATASETS.TRAIN: found nowhere, expected a registered dataset"),
        (["MODEL.WEIGHTS", "gone.pth"], "MODEL.WEIGHTS: found no file "),
        (
            ["TEST.AUG.ENABLED", True],
            "TEST.AUG.ENABLED: found True, expected False: Detectron2 has no test-time augmentation for RetinaNet",
        ),
        (["DISTILL.MAX_GRADIENT_NORM", -1.0], "DISTILL.MAX_GRADIENT_NORM: found -1.0, expected >= 0"),
        (["DISTILL.PERIOD", 0], "DISTILL.PERIOD: found 0, expected >= 1"),
        (["DISTILL.TEACHER.PRECISION", "half"], "DISTILL.TEACHER.PRECISION: found half, expected one of float32, "),
        (["DISTILL.ACAMKD.ALPHA", "much"], "DISTILL.ACAMKD.ALPHA: found 'much', expected float, as 1.0"),
        (["DISTILL.NOPE", 1], "NOPE"),
    ],
)
def test_bad_input_is_one_line(arguments, tmp_path, opts, message):
    with pytest.raises(SystemExit) as stop:
        run(arguments("OUTPUT_DIR", tmp_path / "run", *opts))
    assert str(stop.value).startswith("train_net.py: ") and message in str(stop.value)
    assert "\n" not in str(stop.value) and "{" not in str(stop.value)


def test_a_mistake_in_our_code_keeps_its_traceback(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(train_net.Trainer, "__init__", lambda self, cfg: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        run(arguments("OUTPUT_DIR", tmp_path / "run"))


def worker(command, out):
    """One of two processes: DDP on CPU, where Detectron2 would ask for a GPU's index."""
    from detectron2.engine import defaults
    from torch.nn.parallel import DistributedDataParallel

    defaults.create_ddp_model = lambda model, **kwargs: DistributedDataParallel(model, **kwargs)
    trainer = train_net.Trainer(train_net.setup(train_net.parser().parse_args(command)))
    trainer.resume_or_load(resume=False)
    trainer._hooks = [h for h in trainer._hooks if type(h).__name__ != "EvalHook"]
    trainer.train()
    flat = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    both = comm.all_gather(flat)
    if comm.is_main_process():
        torch.save([torch.equal(both[0], both[1]), comm.get_world_size()], out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "opts", [[], CHEAPER, ["DISTILL.TEACHER.COMPILE", True]], ids=["default", "cheaper", "compile"]
)
def test_two_processes_stay_in_step(arguments, tmp_path, opts):
    """DistributedDataParallel without find_unused_parameters, over gloo."""
    command = arguments("OUTPUT_DIR", tmp_path / "run", *opts)
    code = (
        "import torch\nfrom functools import partial\ntorch.compile = partial(torch.compile, backend='eager')\n"
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n"
        "from detectron2.engine import launch\nfrom tests.d2.test_train import worker\n"
        f"launch(worker, 2, dist_url='auto', args=({command!r}, {str(tmp_path / 'out')!r}))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    script = tmp_path / "two.py"
    script.write_text(code.replace("\nlaunch(", "\nif __name__ == '__main__':\n    launch("))
    done = subprocess.run([sys.executable, str(script)], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "strides" not in done.stderr  # DistributedDataParallel's warning that gradients and buckets differ
    assert torch.load(tmp_path / "out") == [True, 2]
    checkpoint = torch.load(tmp_path / "run/model_final.pth", weights_only=False)
    assert not [k for k in (*checkpoint["model"], *checkpoint["distiller"]) if k.startswith("module.")]


@pytest.mark.slow
def test_the_instant_config_as_a_command(tmp_path):
    """The README's first command: from nothing to a COCO table."""
    environment = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path / "datasets")}
    command = [sys.executable, "train_net.py", "--config-file", "configs/quick_schedules/acam_instant.yaml"]
    done = subprocess.run(
        [*command, "OUTPUT_DIR", str(tmp_path / "out")], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "copypaste: AP,AP50,AP75,APs,APm,APl" in done.stdout + done.stderr


def test_help_names_the_dataset_option(capsys):
    with pytest.raises(SystemExit):
        train_net.parser().parse_args(["--help"])
    assert "NAME JSON IMAGES" in capsys.readouterr().out


@pytest.mark.slow
def test_a_coco_teacher_of_a_student_of_own_classes(arguments, tmp_path, capsys):
    """The names of an own dataset are known before its json is loaded."""
    of_coco = ["MODEL.RETINANET.NUM_CLASSES", 80, "DATASETS.TRAIN", ("coco_2017_train",)]
    save_config(detector_config("Base-RetinaNet.yaml", *of_coco), tmp_path / "teacher.yaml")
    pairs = "['plain disc=sports ball', 'barred disc=clock']"
    opts = ["OUTPUT_DIR", tmp_path / "out", "DISTILL.METHOD", "KD", "DISTILL.CLASS_MAP", pairs]
    run(arguments(*opts))
    (line,) = [text for text in capsys.readouterr().out.splitlines() if "classes: 2 of" in text]
    start = "classes: 2 of the student's 6 are among the teacher's 80: plain disc (sports ball), barred disc (clock); "
    assert (start + "left out, as the teacher does not know them: plain square, ") in line
    logged = [json.loads(text) for text in (tmp_path / "out/metrics.json").read_text().splitlines()]
    assert any(values.get("loss_kd_kl", 0) > 0 for values in logged) and (tmp_path / "out/model_final.pth").is_file()
