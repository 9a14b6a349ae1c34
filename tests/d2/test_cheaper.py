"""The options that make a step cheaper, in real Detectron2; tests/core/test_cheaper.py has what they do."""

from __future__ import annotations

import copy
import json
import logging
from functools import partial

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import JSONWriter

from .conftest import distillation_config, inputs, refused, save_config


def build(student, teacher, *opts):
    return build_model(distillation_config(student, teacher, *opts)).train()


def test_diagnostics_come_from_distilled_iterations_only(retinanet, retinanet_teacher, storage, caplog, tmp_path):
    """Of 0 to 7 every third is distilled: 0, 3, 6; the last ones of two windows of four are 3 and 6."""
    model = build(retinanet, retinanet_teacher, "DISTILL.PERIOD", 3, "DISTILL.LOG_PERIOD", 4, "VIS_PERIOD", 2)
    writer = JSONWriter(str(tmp_path / "metrics.json"))
    pictures = []
    with caplog.at_level(logging.INFO, logger="detectron2.acam_kd"):
        for iteration in range(8):
            storage.iter = iteration
            losses = model(inputs())
            assert ("loss_acam_spatial" in losses) == (iteration in (0, 3, 6))
            storage.put_scalars(**{name: loss.item() for name, loss in losses.items()})
            pictures += [step for _, _, step in storage._vis_data]
            storage.clear_images()
            if iteration in (3, 7):
                writer.write()
    writer.close()
    assert caplog.text.count("p7: spatial_mean") == 2
    assert pictures == [0, 3, 6]  # the first distilled one of every two; there is none in 4 and 5
    lines = {line["iteration"]: line for line in map(json.loads, (tmp_path / "metrics.json").read_text().splitlines())}
    assert [i for i, line in lines.items() if "distill/p3/spatial_mse" in line] == [3, 6]
    assert [i for i, line in lines.items() if "loss_acam_spatial" in line] == [3, 6]
    assert "loss_cls" in lines[7]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "opts"),
    [
        ("retinanet", []),
        ("rcnn", []),
        ("retinanet", ["DISTILL.METHOD", "KD"]),
        ("rcnn", ["DISTILL.METHOD", "KD+Mimic", "DISTILL.TAPS", "['backbone', 'classes']"]),
    ],
    ids=["retinanet", "rcnn", "retinanet classes", "rcnn classes"],
)
def test_options_keep_the_losses_close(kind, opts, request, storage, tmp_path, monkeypatch):
    student = request.getfixturevalue(kind)
    teacher = save_config(student, tmp_path / "t.yaml")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    found = {}
    for name, more in {
        "plain": [],
        "channels_last": ["DISTILL.CHANNELS_LAST", True],
        "compiled": ["DISTILL.TEACHER.COMPILE", True],
        "bfloat16": ["DISTILL.TEACHER.PRECISION", "bfloat16", "DISTILL.CHANNELS_LAST", True],
    }.items():
        torch.manual_seed(3)
        model = build(student, teacher, *opts, *more)
        torch.manual_seed(4)
        losses = model(inputs())
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in model.parameters()), name
        found[name] = {k: v.item() for k, v in losses.items()}
    for name, close in (("channels_last", 1e-4), ("compiled", 1e-4), ("bfloat16", 0.05)):
        assert found[name] == pytest.approx(found["plain"], rel=close, abs=1e-6), name
    assert found["bfloat16"] != found["channels_last"]


def test_between_distilled_iterations_a_class_head_is_read_and_forgotten(retinanet, retinanet_teacher, storage):
    model = build(retinanet, retinanet_teacher, "DISTILL.METHOD", "KD", "DISTILL.PERIOD", 2)
    storage.iter = 1
    losses = model(inputs())
    assert set(losses) == {"loss_cls", "loss_box_reg"}
    head = model.distillation._reader.class_head
    assert not any(tap.armed or tap.times for tap in head.taps)
    with refused("student", "0 calls of head"):
        head.read()


def test_the_students_state_is_the_plain_ones_in_every_case(retinanet, retinanet_teacher):
    opts = ["DISTILL.CHANNELS_LAST", True, "DISTILL.TEACHER.COMPILE", True]
    model = build(retinanet, retinanet_teacher, *opts)
    plain = build_model(retinanet)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    assert model.head.cls_subnet[0].weight.stride(1) == 1 and plain.head.cls_subnet[0].weight.stride(1) == 9
    assert model.distillation.teacher.network.fpn_output3.weight.stride(1) == 1
    copy.deepcopy(model)
