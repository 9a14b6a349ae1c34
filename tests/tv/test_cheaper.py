"""The options that make a step cheaper, in torchvision's runs; tests/core/test_cheaper.py has what they do."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from acam_kd import cli
from acam_kd.core.errors import RunError
from acam_kd.tv import reports
from acam_kd.tv.folder import RunFolder
from acam_kd.tv.models import build_model
from acam_kd.tv.names import option
from acam_kd.tv.run import Settings
from acam_kd.tv.training import train

from .conftest import refuses
from .test_training import interrupted, lines, same, student_of

STUDENT = "retinanet_resnet18_fpn32"


@pytest.fixture
def cheaper(settings, finished):
    """The first and the last of four steps are distilled."""
    how = {"distill_period": 3, "teacher_precision": "bfloat16", "channels_last": True}
    return replace(settings, teacher=str(finished), method="ACAMKD", student=STUDENT, **how)


@pytest.mark.slow
def test_an_interrupted_run_distils_the_same_steps(cheaper, tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "LOG_PERIOD", 2)
    train(cheaper, tmp_path / "whole")
    interrupted(cheaper, tmp_path / "cut")
    train(cheaper, tmp_path / "cut", resume=True)
    assert same(student_of(tmp_path / "whole"), student_of(tmp_path / "cut"))
    for folder in ("whole", "cut"):
        found = lines(tmp_path / folder)
        assert [line["step"] for line in found if "loss_acam_spatial" in line] == [1, 4]  # counted from 1
        assert [line["step"] for line in found if "distill/distillation_to_task" in line] == [1, 4]
    build_model(STUDENT, num_classes=7).load_state_dict(student_of(tmp_path / "whole"))


@pytest.mark.slow
def test_an_interrupted_run_keeps_the_weight_of_its_share(settings, finished, tmp_path):
    """A run of four steps; the first is measured."""
    shared = replace(settings, teacher=str(finished), method="Mimic", student=STUDENT, weight="share", warmup_iters=3)
    train(shared, tmp_path / "whole")
    interrupted(shared, tmp_path / "cut")
    train(shared, tmp_path / "cut", resume=True)
    assert same(student_of(tmp_path / "whole"), student_of(tmp_path / "cut"))
    train(replace(shared, weight="fixed"), tmp_path / "fixed")
    assert not same(student_of(tmp_path / "whole"), student_of(tmp_path / "fixed"))
    with refuses("weight", "fixed", "'share', as in the run in ", "{output}"):
        RunFolder(tmp_path / "cut").check(replace(shared, weight="fixed"), resume=True)


def test_a_period_changes_the_student_and_is_kept(cheaper, tmp_path):
    train(replace(cheaper, iterations=2), tmp_path / "run")
    train(replace(cheaper, iterations=2, distill_period=1), tmp_path / "every")
    assert not same(student_of(tmp_path / "run"), student_of(tmp_path / "every"))
    with refuses("distill_period", "1", "3, as in the run in ", "{output}"):
        RunFolder(tmp_path / "run").check(replace(cheaper, iterations=2, distill_period=1), resume=True)
    with refuses("teacher_precision", "", "'bfloat16', as in the run in ", "{output}"):
        RunFolder(tmp_path / "run").check(replace(cheaper, iterations=2, teacher_precision=""), resume=True)
    RunFolder(tmp_path / "run").check(replace(cheaper, iterations=2, channels_last=False), resume=True)


def test_a_run_older_than_an_option_goes_on_with_its_default(settings, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.start(settings, {})
    path = tmp_path / "run/settings.json"
    old = {name: value for name, value in json.loads(path.read_text()).items() if name != "distill_period"}
    path.write_text(json.dumps(old))
    folder.check(settings, resume=True)
    with refuses("distill_period", "2", "1, as in the run in "):
        folder.check(replace(settings, distill_period=2), resume=True)


def test_the_command_takes_them(data, finished, tmp_path):
    common = ["--data", str(data), "--student", STUDENT, "--teacher", str(finished), "--output", str(tmp_path)]
    asked = cli.train_settings(
        [*common, "--distill-period", "4", "--teacher-precision", "float16", "--teacher-compile", "--channels-last"]
    )
    assert (asked.distill_period, asked.teacher_precision) == (4, "float16")
    assert asked.teacher_compile and asked.channels_last
    off = cli.train_settings(common)
    names = ("distill_period", "teacher_precision", "teacher_compile", "channels_last")
    assert (
        [getattr(off, name) for name in names] == [getattr(Settings, name) for name in names] == [1, "", False, False]
    )


@pytest.mark.slow
def test_what_fails_in_a_step_is_said_in_the_commands_words(cheaper, tmp_path, monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    with refuses("teacher_compile", "True", "False", "it cannot be compiled here: no compiler"):
        train(replace(cheaper, teacher_compile=True), tmp_path / "a")

    def huge(model, step):
        with torch.no_grad():
            next(model.distillation.teacher.network.fpn.layer_blocks.parameters()).mul_(1e9)

    with pytest.raises(
        RunError, match="^iteration 0: the teacher's features, made in float16, are not finite"
    ) as error:
        train(replace(cheaper, teacher_precision="float16"), tmp_path / "b", observers=[huge])
    assert error.value.render(option).endswith("see --teacher-precision")
    with refuses("period", "0", ">= 1"):
        train(replace(cheaper, distill_period=0), tmp_path / "c")
