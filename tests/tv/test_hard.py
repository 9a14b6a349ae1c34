"""HARD: the properties that its description has, and runs from the command."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from PIL import Image

from acam_kd.data.splits import find_any_split
from acam_kd.methods.kd import kd_loss
from acam_kd.methods.parts.augmentor import augmentor_objective
from acam_kd.tv.build import build_models
from acam_kd.tv.hard import CONSTANTS, Alternation, HardAugmentor, check_augmentor
from acam_kd.tv.labels import load_data
from acam_kd.tv.models import build_model
from acam_kd.tv.training import train
from tests.tv.conftest import refuses
from tests.tv.test_classification import folders, teacher, tiny  # noqa: F401
from tests.tv.test_training import interrupted


@pytest.fixture(params=["hard", "hard-colour"])
def hard(folders, teacher, request):  # noqa: F811
    kind = {"augmentor": request.param, "augmentor_ratio": 1}
    settings = tiny(folders, teacher=str(teacher), method="KD", inherit="never", **kind)
    torch.manual_seed(0)
    data = load_data(find_any_split(folders, "train"), "resnet8", name="data", size=16)
    student = build_models(settings, data).student.train()
    student.distillation.iteration = 0
    return HardAugmentor(Fabric(accelerator="cpu"), student, student.distillation, settings)


@pytest.fixture
def images():
    torch.manual_seed(1)
    return [torch.rand(3, 16, 16) for _ in range(8)]


def test_the_identity_as_augmentor_is_exactly_kd(hard, images):
    torch.nn.init.zeros_(hard.augmentor.std)
    loss = hard.losses(images)["loss_hard"]
    again = copy.deepcopy(hard.student.network)
    batch = hard.student.batch(images)
    with torch.no_grad():
        expected = hard.alpha * kd_loss(again(batch), hard._teacher(batch), hard.temperature)
        plain = hard.student(images, [{"label": 0}] * 8)
    assert (hard.alpha, hard.temperature) == (9.0, 4.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3) and "loss_classification" in plain


def test_one_step_of_the_augmentor_raises_its_objective_and_the_disagreement_without_the_teachers_part(
    hard, images, monkeypatch
):
    batch = hard.student.batch(images)
    draw = torch.randn(8, len(hard.augmentor.bias))
    monkeypatch.setattr(hard.augmentor, "draw", lambda count: draw)
    before = augmentor_objective(*hard.measure(batch), CONSTANTS.lambda_teacher).item()
    hard.step(images, 0)
    assert augmentor_objective(*hard.measure(batch), CONSTANTS.lambda_teacher).item() > before
    monkeypatch.setattr("acam_kd.tv.hard.CONSTANTS", type(CONSTANTS)(lambda_teacher=0.0))
    before = hard.measure(batch)[0].item()
    hard.optimizer = torch.optim.SGD(hard.augmentor.parameters(), lr=1e-4)
    hard.step(images, 1)
    assert hard.measure(batch)[0].item() > before


def test_the_nets_get_no_gradient_and_move_no_statistics_in_the_augmentors_step(hard, images):
    networks = hard.student.network, hard.attached.teacher.network
    before = [copy.deepcopy(network.state_dict()) for network in networks]
    first = copy.deepcopy(hard.augmentor.state_dict())
    hard.step(images, 0)
    assert all(p.grad is None for network in networks for p in network.parameters())
    for network, state in zip(networks, before):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert not torch.equal(hard.augmentor.bias, first["bias"]) and not torch.equal(hard.augmentor.std, first["std"])
    assert hard.student.training


def test_the_students_loss_trains_the_student_alone(hard, images):
    statistics = hard.student.network.bn1.running_mean.clone()
    hard.losses(images)["loss_hard"].backward()
    assert hard.student.network.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in hard.augmentor.parameters())
    assert all(p.grad is None for p in hard.attached.teacher.network.parameters())
    assert torch.equal(statistics, hard.student.network.bn1.running_mean)


def test_turns_by_ratio():
    turns = Alternation(5, None)
    assert [turns.augmentor_learns(step) for step in range(10)] == ([False] * 4 + [True]) * 2
    turns.saw(0.0)
    assert turns.student_learns()


def test_turns_by_thresholds():
    turns, found = Alternation(5, (1.0, 2.0)), []
    for disagreement in (3.0, 1.5, 0.9, 1.5, 2.0, 2.1, 1.5):
        turns.saw(disagreement)
        found.append(turns.student_learns())
        assert turns.augmentor_learns(0) is not turns.student_learns()
    assert found == [True, True, False, False, False, True, True]


def test_a_run_resumes_as_if_it_had_not_been_interrupted(folders, teacher, tmp_path):  # noqa: F811
    settings = tiny(
        folders, teacher=str(teacher), method="NKD", augmentor="hard", augmentor_ratio=2, iterations=6, eval_period=3
    )
    train(settings, tmp_path / "whole")
    interrupted(settings, tmp_path / "parts", after=3)
    train(settings, tmp_path / "parts", resume=True)
    one, two = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(value, two["state_dict"][name]) for name, value in one["state_dict"].items())
    assert torch.equal(one["augmentor"]["augmentor"]["bias"], two["augmentor"]["augmentor"]["bias"])
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert any("loss_hard" in line for line in lines)
    assert any("distill/augmentor/teacher_change" in line for line in lines)
    for name in ("pictures/augmented_step_6.jpg", "confusion.png"):
        with Image.open(tmp_path / "whole" / name) as picture:
            assert min(picture.size) > 50


@pytest.mark.slow
@pytest.mark.parametrize("thresholds", [[], ["--augmentor-thresholds", "100", "1000"]], ids=["ratio", "thresholds"])
def test_two_processes_have_one_augmentor_and_one_student(folders, teacher, tmp_path, thresholds):  # noqa: F811
    arguments = ["--data", folders, "--student", "resnet8", "--size", "16", "--teacher", teacher, "--method", "KD"]
    arguments += [
        "--augmentor",
        "hard",
        "--augmentor-ratio",
        "1",
        *thresholds,
        "--iterations",
        "4",
        "--batch-size",
        "6",
    ]
    arguments += ["--workers", "0", "--accelerator", "cpu", "--devices", "2", "--output", tmp_path / "run"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = Path(__file__).with_name("hard_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, worker, tmp_path, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert len(one["augmentor"]) == 2 and one["turns"] == two["turns"]
    for part in ("augmentor", "student"):
        assert all(torch.equal(value, two[part][name]) for name, value in one[part].items()), part
    assert not torch.equal(one["augmentor"]["bias"], torch.tensor([1.0, 0, 0, 0, 1, 0]))


@pytest.mark.parametrize(
    ("changes", "argument", "value"),
    [
        ({"augmentor": "hard"}, "augmentor", "without a teacher"),
        ({"augmentor_ratio": 2}, "augmentor_ratio", "2"),
        ({"augmentor_thresholds": (1.0, 2.0)}, "augmentor_thresholds", "1.0, 2.0"),
    ],
)
def test_options_that_need_another(folders, changes, argument, value):  # noqa: F811
    with refuses(argument, value):
        check_augmentor(tiny(folders, **changes), build_model("resnet8", num_classes=3), None, comparable=False)


def test_classifiers_and_teachers_of_their_classes_alone(folders):  # noqa: F811
    settings = tiny(folders, augmentor="hard", method="KD")
    net, detector = build_model("resnet8", num_classes=3), build_model("fcos_mobilenet_v3_small_fpn64", num_classes=2)
    with refuses("augmentor", "hard for"):
        check_augmentor(settings, detector, detector, comparable=True)
    with refuses("augmentor", "other classes"):
        check_augmentor(settings, net, net, comparable=False)
    with refuses("augmentor_thresholds", "2.0, 1.0"):
        check_augmentor(tiny(folders, augmentor="hard", method="KD", augmentor_thresholds=(2.0, 1.0)), net, net,
                        comparable=True)  # fmt: skip
