"""The look at a set-up before a long run: what is well, what is to be looked at, what is broken."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from acam_kd.cli import main
from acam_kd.report.health import BROKEN, LOOK, OK, TESTED, Examination, Part
from acam_kd.report.one_step import look_at_step
from acam_kd.tv.doctor import doctor

from .conftest import STUDENT


def parts(looked):
    return {part.name: part for part in looked.parts}


def test_a_sound_set_up(settings, finished):
    looked = doctor(dataclasses.replace(settings, teacher=str(finished), method="Mimic"))
    found = parts(looked)
    assert [*found] == ["versions", "device", "data", "models", "teacher", "one step"]
    assert found["data"].state == OK and "training: 6 images, 6 classes" in found["data"].lines
    assert any("distilling with Mimic on 0 <- 0" in line for line in found["models"].lines)
    assert found["models"].lines[-1].startswith("teacher: mean [0.485, 0.456, 0.406]")
    assert found["teacher"].state == BROKEN and looked.status == 1  # four steps teach nothing
    assert found["one step"].state == OK
    assert re.search(r"the method's losses are [\d.e-]+ times the task's$", "\n".join(found["one step"].lines), re.M)
    assert re.match(r"the method's gradient reaches \d+ of \d+ of", found["one step"].lines[0])


def test_losses_far_above_the_tasks_are_to_be_looked_at(settings, finished):
    loud = dataclasses.replace(settings, teacher=str(finished), method="Mimic", options=("alpha=1e6",))
    part = parts(doctor(loud))["one step"]
    assert part.state == LOOK
    assert re.search(
        r"losses are \S+ times the task's: if they stay above 10 times, lower --set Mimic.alpha, or set --weight to share",
        "\n".join(part.lines),
    )


def test_one_step_is_that_of_one_device(settings, monkeypatch):
    seen = []
    monkeypatch.setattr("acam_kd.tv.doctor.look_at_step", lambda part, student, images, *_, **__: seen.append(images))
    for devices, nodes in ((1, 1), (2, 1), (1, 2), (8, 1)):
        doctor(dataclasses.replace(settings, batch_size=4, devices=devices, num_nodes=nodes))
    assert [len(images) for images in seen] == [4, 2, 2, 1]


def test_a_student_alone(settings):
    looked = doctor(dataclasses.replace(settings, method=""))
    assert "teacher" not in parts(looked) and looked.status == 0
    assert parts(looked)["one step"].lines[0].startswith("losses: classification")


def test_what_is_broken_ends_its_part_and_sets_the_status(settings, tmp_path, capsys):
    looked = doctor(dataclasses.replace(settings, teacher=str(tmp_path), method="Mimic"))
    assert parts(looked)["models"].state == BROKEN and [*parts(looked)][-1] == "models"
    assert parts(looked)["models"].lines[-1].startswith("--teacher: found no finished run in")
    data = Path(settings.val_split.json_file).parent
    with pytest.raises(SystemExit) as error:
        main(["doctor", "--data", str(data), "--student", STUDENT, "--size", "64", "--teacher", str(tmp_path)])
    assert error.value.code == 1
    assert re.search(r"^models    broken  --teacher: found no finished run", capsys.readouterr().out, re.M)


def test_the_tested_versions_are_those_of_the_constraints():
    lines = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    for package, version in TESTED.items():
        assert f"{package}=={version}" in lines


def test_a_gradient_that_is_not_finite_is_broken():
    class Student(torch.nn.Linear):
        def forward(self, x):
            return {"loss": (super().forward(x) * 0).sqrt().sum()}

    part = Part("one step")
    look_at_step(part, Student(1, 1), torch.zeros(1, 1))
    assert part.state == BROKEN and "a gradient is not finite" in part.lines


def test_warnings_are_to_be_looked_at():
    import logging

    looked, logger = Examination(str), logging.getLogger("acam_kd.a_test")
    with looked.part("a") as part, looked.logged(part, logger):
        logger.info("fine")
        assert part.state == OK
        logger.warning("not so fine")
    assert (part.state, part.lines, looked.status) == (LOOK, ["fine", "not so fine"], 0)
