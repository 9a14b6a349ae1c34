"""The best checkpoint and the moving average of the student's weights."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from acam_kd.cli import main
from acam_kd.core.average import Average
from acam_kd.tv.best import Best
from acam_kd.tv.checkpoint import read_checkpoint
from acam_kd.tv.folder import RunFolder
from acam_kd.tv.training import train

from .test_training import interrupted, same, student_of


def linear(value):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def test_the_better_one_is_kept(tmp_path):
    best = Best(RunFolder(tmp_path))
    kept = []
    for step, value in enumerate([math.nan, 1.0, 3.0, 3.0, 2.0, math.nan], 1):
        best.offer(linear(step), step, {"AP": value, "AP50": 9.0})
        kept.append(float(torch.load(tmp_path / "best.pth")["weight"]))
    assert kept == [1, 2, 3, 3, 3, 3]
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "metric": "AP", "value": 3.0, "step": 3, "metrics": {"AP": 3.0, "AP50": 9.0}
    }  # fmt: skip


def test_steps_that_are_done_again_are_judged_anew(tmp_path):
    best = Best(RunFolder(tmp_path))
    best.offer(linear(1), 1, {"AP": 5.0})
    best.offer(linear(3), 3, {"AP": 9.0})
    best.offer(linear(2), 2, {"AP": 4.0})  # resumed before step 3
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 2


def test_the_average_by_hand():
    model = nn.BatchNorm2d(1)
    average = Average(model, 0.9)
    decays = [2 / 11, 3 / 12]
    expected = 1.0
    for decay, value in zip(decays, (2.0, 3.0)):
        nn.init.constant_(model.weight, value)
        model.running_mean.fill_(value)
        model.num_batches_tracked += 1
        average.update()
        expected = decay * expected + (1 - decay) * value
    assert float(average.tensors["weight"]) == pytest.approx(expected)
    with pytest.raises(ZeroDivisionError), average.applied():
        assert model.weight.item() == pytest.approx(expected) and int(model.num_batches_tracked) == 2
        raise ZeroDivisionError
    assert model.weight.item() == 3 == float(model.running_mean)


def test_no_average_does_nothing():
    model = linear(2)
    average = Average(model, 0.0)
    average.update()
    with average.applied():
        assert model.weight.item() == 2
    assert average.state_dict() == {} and average.tensors == {}


def test_a_run_keeps_its_average_and_its_best(settings, tmp_path):
    settings = dataclasses.replace(settings, ema=0.9, iterations=2)
    states = []
    train(settings, tmp_path / "a", observers=[lambda model, _: states.append(copy.deepcopy(model.state_dict()))])
    student, best = (torch.load(tmp_path / "a" / name) for name in ("student.pth", "best.pth"))
    state = read_checkpoint(tmp_path / "a" / "last.ckpt")
    raw = {name.removeprefix("model."): value for name, value in state["state_dict"].items()}
    name = "head.classification_head.cls_logits.weight"
    assert torch.equal(student[name], state["average"]["tensors"][name]) and state["average"]["updates"] == 2
    assert torch.equal(student[name], states[-1][name]) and torch.equal(best[name], student[name])
    assert not torch.equal(student[name], raw[name])
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert json.loads((tmp_path / "a" / "best.json").read_text())["metrics"] == result["metrics"]


def test_a_resumed_run_has_the_same_average(settings, tmp_path):
    settings = dataclasses.replace(settings, ema=0.9)
    train(settings, tmp_path / "a")
    interrupted(settings, tmp_path / "b")
    train(settings, tmp_path / "b", resume=True)
    assert same(student_of(tmp_path / "a"), student_of(tmp_path / "b"))


def test_a_decay_of_one_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--ema", "1", "--output", "x"])
    assert "argument --ema: must be below 1" in capsys.readouterr().err
