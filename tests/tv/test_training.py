"""Whole runs of a few steps: their files, their resuming and their failures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from acam_kd.core.errors import RunError
from acam_kd.files import numbers
from acam_kd.methods import PKD, Mimic
from acam_kd.tv.build import evaluate
from acam_kd.tv.card import read_card
from acam_kd.tv.doctor import doctor
from acam_kd.tv.folder import RunFolder
from acam_kd.tv.models import build_model
from acam_kd.tv.names import option
from acam_kd.tv.norms import enough_values
from acam_kd.tv.optimizer import learning_rate_curve
from acam_kd.tv.training import train

from .conftest import STUDENT, refuses


@pytest.fixture
def distilling(settings, finished):
    return replace(settings, teacher=str(finished), method="ACAMKD", inherit="auto", student="retinanet_resnet18_fpn32")


def interrupted(settings, folder, after=2):
    """A run that is stopped after some steps."""

    def interrupt(_, step):
        if step == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, folder, observers=[interrupt])


def student_of(folder):
    return torch.load(folder / "student.pth", weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_a_plain_student_and_says_what_it_was(settings, finished):
    build_model(STUDENT, num_classes=7).load_state_dict(student_of(finished))  # strict
    card, _ = read_card(finished)
    assert (card.name, card.num_classes, card.size) == (STUDENT, 7, 64) and card.categories[2] == "barred disc"
    result = json.loads((finished / "result.json").read_text())
    assert result["settings"]["seed"] == 0 and result["versions"]["torch"] == torch.__version__
    assert result["parameters"] == sum(p.numel() for p in build_model(STUDENT, num_classes=7).parameters())
    found = [line for line in lines(finished) if "AP" in line]
    assert [line["step"] for line in found] == [2, 4]
    assert evaluate(str(finished), "", settings.val_split, workers=0) == pytest.approx(
        numbers(result["metrics"]), nan_ok=True
    )
    assert {p["image_id"] for p in json.loads((finished / "predictions.json").read_text())} <= {1, 2, 3}


@pytest.mark.slow
def test_the_seed_decides_everything(settings, finished, tmp_path):
    torch.rand(5)
    train(settings, tmp_path / "again")
    assert same(student_of(tmp_path / "again"), student_of(finished))
    train(replace(settings, seed=1), tmp_path / "other")
    assert not same(student_of(tmp_path / "other"), student_of(finished))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["retinanet", "fasterrcnn"])
def test_an_interrupted_run_goes_on_bit_for_bit(distilling, tmp_path, kind):
    """Faster R-CNN draws random numbers in training: its samples of proposals."""
    settings = distilling if kind == "retinanet" else replace(distilling, student="fasterrcnn_resnet18_fpn32")
    train(settings, tmp_path / "whole")
    interrupted(settings, tmp_path / "cut")
    assert not (tmp_path / "cut/student.pth").exists() and not (tmp_path / "cut/result.json").exists()
    torch.rand(3)
    train(settings, tmp_path / "cut", resume=True)
    assert same(student_of(tmp_path / "whole"), student_of(tmp_path / "cut"))
    assert {line["step"] for line in lines(tmp_path / "cut") if "AP" in line} == {2, 4}


def of_version_0_1(path):
    """Rewrite a checkpoint as version 0.1 wrote it: one model with the parts ``student`` and ``distiller``."""
    checkpoint = torch.load(path, weights_only=False)
    state, learnt = checkpoint["state_dict"], checkpoint.pop("distiller")
    assert learnt and not any("distillation" in name for name in state)
    old = {name.replace("model.", "model.student.", 1): value for name, value in state.items()}
    assert not old.keys() & state.keys()
    checkpoint["state_dict"] = {**old, **{f"model.distiller.{name}": value for name, value in learnt.items()}}
    torch.save(checkpoint, path)


@pytest.mark.slow
@pytest.mark.parametrize("student", ["retinanet_resnet18_fpn32", "lraspp_mobilenet_v3_large"])
def test_a_run_of_version_0_1_resumes_bit_for_bit(distilling, tmp_path, student):
    settings = replace(distilling, student=student)
    if student.startswith("lraspp"):
        train(replace(settings, teacher="", method="", iterations=1), tmp_path / "teacher")
        settings = replace(settings, teacher=str(tmp_path / "teacher"))
    train(settings, tmp_path / "whole")
    interrupted(settings, tmp_path / "cut")
    of_version_0_1(tmp_path / "cut/last.ckpt")
    train(settings, tmp_path / "cut", resume=True)
    assert same(student_of(tmp_path / "whole"), student_of(tmp_path / "cut"))
    learnt = [torch.load(tmp_path / run / "last.ckpt", weights_only=False)["distiller"] for run in ("whole", "cut")]
    assert same(*learnt)


def test_a_run_of_version_0_1_without_a_method_resumes_too(settings, finished, tmp_path):
    interrupted(settings, tmp_path / "run")
    path = tmp_path / "run/last.ckpt"
    checkpoint = torch.load(path, weights_only=False)
    assert "distiller" not in checkpoint
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {name.replace("model.", "model.student.", 1): value for name, value in state.items()}
    torch.save(checkpoint, path)
    train(settings, tmp_path / "run", resume=True)
    assert same(student_of(finished), student_of(tmp_path / "run"))


@pytest.mark.parametrize(
    ("change", "what"),
    [({"method": "MGD"}, " MGD"), ({"levels": ("0", "1")}, "is unknown"), ({"method": ""}, "no method")],
)
@pytest.mark.parametrize("version", ["0.1", "today"])
def test_a_run_whose_method_changed_is_refused(distilling, tmp_path, change, what, version):
    interrupted(distilling, tmp_path / "run")
    if version == "0.1":
        of_version_0_1(tmp_path / "run/last.ckpt")
    ((argument, _),) = change.items()
    with refuses(argument, "", "as in the run in", "choose another {output}"):
        train(replace(distilling, **change), tmp_path / "run", resume=True)
    (tmp_path / "run/settings.json").unlink()  # nothing but the checkpoint knows
    with pytest.raises(RunError) as error:
        train(replace(distilling, **change), tmp_path / "run", resume=True)
    line = error.value.render(option)
    assert what in line and "\n" not in line and "--method" in line
    assert not (tmp_path / "run/student.pth").exists()


def not_a_number(text):
    raise AssertionError(f"{text} is no JSON")


def test_a_task_loss_of_zero_leaves_valid_json(settings, data, tmp_path, monkeypatch):
    """No pixel has a label: what the student is to learn is the teacher's alone, and no ratio is defined."""
    from acam_kd.data.splits import find_any_split

    root = tmp_path / "data"
    for split in ("train", "val"):
        shutil.copytree(data / split, root / split / "images")
        shutil.copytree(data / f"{split}_labels", root / split / "labels")
    names = "background,disc,barred disc,triangle,barred triangle,square,barred square"
    splits = {f"{split}_split": find_any_split(root, split, names) for split in ("train", "val")}
    settings = replace(settings, student="lraspp_mobilenet_v3_large", iterations=1, eval_period=1, **splits)
    train(settings, tmp_path / "teacher")
    for path in (root / "train/labels").iterdir():
        Image.fromarray(np.full_like(np.array(Image.open(path)), 255)).save(path)
    monkeypatch.setattr("acam_kd.tv.labels.check_labels", lambda *_, **__: None)  # it would refuse such data
    monkeypatch.setattr("acam_kd.tv.reports.LOG_PERIOD", 1)
    train(replace(settings, teacher=str(tmp_path / "teacher"), method="Mimic"), tmp_path / "run")
    text = (tmp_path / "run/metrics.jsonl").read_text()
    found = [json.loads(line, parse_constant=not_a_number) for line in text.splitlines()]
    (losses,) = [line for line in found if "loss" in line]
    assert losses["loss_segmentation"] == 0 and losses["loss_mimic_mse"] > 0
    assert not any("distill/distillation_to_task" in line for line in found)


def test_warnings_name_options(distilling, tmp_path, monkeypatch, caplog):
    settings = replace(distilling, method="PKD+ACAMKD", student="fcos_resnet18_fpn64", iterations=1)
    place = {"0/scale": "scales differ: set {standardize_fused} to True, or choose another {method}"}
    monkeypatch.setattr("acam_kd.methods.ACAMKD.warnings", lambda self: place)
    monkeypatch.setattr(PKD, "warnings", lambda self: {"0": "see {alpha}, {taps}"})
    monkeypatch.setattr("acam_kd.tv.reports.LOG_PERIOD", 1)
    train(settings, tmp_path / "run")
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "scales differ: set --set ACAMKD.standardize_fused to True, or choose another --method" in said
    assert "see --set PKD.alpha, --taps" in said
    assert not any("DISTILL" in text or "STANDARDIZE" in text for text in said)


def test_what_is_complete_is_not_run_again(settings, finished):
    before = (finished / "student.pth").stat().st_mtime_ns
    assert train(settings, finished, resume=True) == json.loads((finished / "result.json").read_text())
    assert (finished / "student.pth").stat().st_mtime_ns == before
    with refuses("output", "which has a run already", "a folder without a run", "give {resume} to resume"):
        train(settings, finished)
    with refuses("learning_rate", "0.02", "0.01, as in the run in ", "choose another {output}"):
        train(replace(settings, learning_rate=0.02), finished, resume=True)
    with refuses("seed", "1", "0, as in the run in "):
        RunFolder(finished).check(replace(settings, seed=1), resume=True)


@pytest.mark.slow
def test_every_method_starts_from_the_same_student(distilling, tmp_path):
    """The random numbers of teacher and distiller change neither the student's start nor the data."""
    starts = {}

    def keep(name):
        def observer(model, step):
            if step == 0:
                starts[name] = {k: v.clone() for k, v in model.state_dict().items()}

        return observer

    settings = replace(distilling, iterations=1, inherit="never")
    train(replace(settings, method=""), tmp_path / "a", observers=[keep("alone")])
    train(settings, tmp_path / "b", observers=[keep("acam")])
    train(replace(settings, method="Mimic"), tmp_path / "c", observers=[keep("mimic")])
    assert same(starts["alone"], starts["acam"]) and same(starts["alone"], starts["mimic"])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(distilling, tmp_path, monkeypatch):
    settings = replace(distilling, method="Mimic")
    forward = Mimic.forward

    def diverge(self, *features):
        self.calls = getattr(self, "calls", 0) + 1
        return {"loss_mimic_mse": forward(self, *features)["loss_mimic_mse"] * (float("nan") if self.calls > 2 else 1)}

    monkeypatch.setattr(Mimic, "forward", diverge)
    with pytest.raises(RunError) as error:
        train(settings, tmp_path / "run")
    assert error.value.where == "iteration 2" and "loss is not finite: loss_mimic_mse = nan" in error.value.what
    state = torch.load(tmp_path / "run/last.ckpt", weights_only=False)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert not (tmp_path / "run/result.json").exists()
    with refuses("folder", f"no finished run in {tmp_path}/run", "a folder with student.json and student.pth"):
        read_card(tmp_path / "run")


def test_a_broken_gradient_stops_before_the_step(settings, tmp_path, monkeypatch):
    def break_gradient(model, step):
        if step == 0:
            weight = model.backbone.fpn.inner_blocks[0][0].weight
            weight.register_hook(lambda grad: grad * float("inf"))

    with pytest.raises(RunError, match="gradient is not finite in .*fpn.inner_blocks.0.0.w") as error:
        train(settings, tmp_path / "run", observers=[break_gradient])
    assert error.value.where == "iteration 0"


def test_segmentation_runs_through_the_same_door(settings, tmp_path):
    settings = replace(settings, student="lraspp_mobilenet_v3_large", iterations=2)
    result = train(settings, tmp_path / "run")
    assert 0 <= result["metrics"]["mIoU"] <= 100
    found = evaluate(str(tmp_path / "run"), "", settings.val_split, workers=0)
    assert found == pytest.approx(result["metrics"])


def test_schedules_fall_to_zero(settings):
    """A quarter is warm-up; DeepLab's power is 0.9."""
    for schedule, half in (("cosine", 0.5), ("poly", 0.5**0.9)):
        asked = replace(settings, schedule=schedule, iterations=40, warmup=10, learning_rate=2.0)
        factor = learning_rate_curve(asked)
        assert factor(0) == 1 / 11 and factor(10) == 1 and factor(40) == 0
        assert factor(25) == pytest.approx(half)


def test_a_teacher_without_weights_is_refused(settings, tmp_path):
    with refuses("teacher", "fcos_resnet18_fpn without weights", "the folder of a finished run", "{teacher_weights}"):
        train(replace(settings, teacher="fcos_resnet18_fpn", method="Mimic"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_bfloat16_trains(distilling, tmp_path):
    """Not a RetinaNet: torch 2.12's CPU gives wrong weight gradients of 3x3 convolutions on 1x1 maps, as its P7 here."""
    settings = replace(distilling, student="fasterrcnn_resnet18_fpn32", precision="bf16-mixed", iterations=2)
    result = train(settings, tmp_path / "run")
    assert result["metrics"]["AP"] >= 0
    assert all(tensor.dtype != torch.bfloat16 for tensor in student_of(tmp_path / "run").values())


@pytest.mark.slow
def test_masks_of_instances_are_learnt_and_evaluated(settings, tmp_path):
    result = train(replace(settings, student="maskrcnn_resnet18_fpn32", iterations=1), tmp_path / "run")
    assert {"AP", "segm/AP"} <= result["metrics"].keys()
    assert evaluate(str(tmp_path / "run"), "", settings.val_split, workers=0).keys() == result["metrics"].keys()


@pytest.mark.slow
def test_a_folder_as_student_goes_on_from_its_student(settings, finished, tmp_path):
    settings = replace(settings, student=str(finished), size=None, iterations=1, learning_rate=1e-9)
    train(settings, tmp_path / "run")
    assert read_card(tmp_path / "run")[0] == read_card(finished)[0]
    for name, tensor in student_of(finished).items():
        if name.endswith("weight"):
            torch.testing.assert_close(student_of(tmp_path / "run")[name], tensor)
    with refuses("student_backbone_weights", "DEFAULT", f"none: the folder {finished} has weights"):
        train(replace(settings, student_backbone_weights="DEFAULT"), tmp_path / "other")


def test_named_weights_know_their_own_classes(settings, tmp_path):
    settings = replace(settings, student="fcos_resnet50_fpn", student_weights="DEFAULT")
    value = "DEFAULT of fcos_resnet50_fpn for 91 classes with the background"
    with refuses("student_weights", value, "the data's 7", "start from {student_backbone_weights}"):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_lightning_refuses_is_one_line(settings, tmp_path):
    with refuses("accelerator", "", "what Lightning takes", "see {accelerator}, {devices}, {num_nodes}, {precision}"):
        train(replace(settings, accelerator="tpu"), tmp_path / "run")
    with refuses("batch_size", "1", "2 images a device at least"):
        train(replace(settings, student="deeplabv3_mobilenet_v3_large", batch_size=1), tmp_path / "run")


def test_a_batch_norm_of_one_value_is_one_line(settings, tmp_path):
    with refuses("batch_size", "1", "2 images a device at least", "SSDLite"):
        train(replace(settings, student="ssdlite320_mobilenet_v3_large", batch_size=1), tmp_path / "ssd")
    single = replace(settings, student="fcos_mobilenet_v2_fpn32", size=32, batch_size=1)
    line = (
        "a batch norm gets one image, whose map has one pixel; raise --batch-size to 2 images a device, or raise --size"
    )
    with pytest.raises(RunError) as error:
        train(single, tmp_path / "run")
    assert error.value.render(option) == f"iteration 0: {line}"
    assert doctor(single).parts[-1].lines[-1] == f"one step: {line}"


def test_other_errors_stay_as_they_are():
    with pytest.raises(ValueError, match="^other$"), enough_values("iteration 1"):
        raise ValueError("other")


def test_a_broken_checkpoint_is_said_and_a_folder_that_is_a_file(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/last.ckpt").write_text("half a file")
    with pytest.raises(RunError) as error:
        train(settings, tmp_path / "run", resume=True)
    assert error.value.render(option) == (
        f"{tmp_path}/run/last.ckpt: it is no checkpoint; delete it, and --resume starts anew"
    )
    with refuses("output", "run/last.ckpt, which cannot be written (", "a folder to write into"):
        train(settings, tmp_path / "run/last.ckpt")


@pytest.mark.slow
def test_two_processes_evaluate_each_image_once_and_agree(distilling, finished, data, tmp_path):
    command = [sys.executable, "-m", "acam_kd.cli", "train", "--data", str(data), "--student", STUDENT, "--size", "64"]
    command += [
        "--teacher",
        str(finished),
        "--iterations",
        "3",
        "--batch-size",
        "2",
        "--devices",
        "2",
        "--workers",
        "0",
    ]
    command += [
        "--accelerator",
        "cpu",
        "--eval-period",
        "3",
        "--checkpoint-period",
        "2",
        "--output",
        str(tmp_path / "run"),
    ]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "run/result.json").read_text())
    single = evaluate(str(tmp_path / "run"), "", distilling.val_split, workers=0)
    assert single == pytest.approx(numbers(result["metrics"]), nan_ok=True, abs=1e-4)
    assert [line["step"] for line in lines(tmp_path / "run") if "AP" in line] == [3]
