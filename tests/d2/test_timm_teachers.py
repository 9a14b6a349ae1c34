"""Networks of timm as teachers of Detectron2's detectors: levels by path, pixels, sizes of all kinds."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

import acam_kd

from ..timm_teachers import TEACHERS, normalised, vit
from .conftest import detector_config, inputs, refused


def student():
    torch.manual_seed(0)
    return build_model(detector_config("Base-RetinaNet.yaml")).train()


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("method", ["Cosine", "ACAMKD"])
def test_it_teaches_levels_of_an_fpn(name, method):
    build, levels, strides = TEACHERS[name]
    model, teacher = student(), build()
    acam_kd.distill(model, teacher, method=method, teacher_levels=levels, student_levels=[*levels])
    assert {level: spec.stride for level, spec in model.distillation.shapes["teacher"].items()} == strides
    before = [p.detach().clone() for p in teacher.parameters()]
    for size in ((70, 90), (64, 96)):
        with EventStorage():
            losses = model(inputs(size=size))
        added = {name: loss for name, loss in losses.items() if name in model.distillation.losses}
        assert added and all(loss.isfinite() for loss in added.values())
        model.zero_grad()
        sum(added.values()).backward()
        assert model.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(teacher.parameters(), before))


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_its_own_pixels_are_honoured(order):
    """The student's images are BGR or RGB from 0 to 255, and padded; timm's are RGB from 0 to 1."""
    torch.manual_seed(0)
    model = build_model(detector_config("Base-RetinaNet.yaml", "INPUT.FORMAT", order)).train()
    model.input_format = order
    teacher, batch, seen = vit(), inputs(size=(70, 90)), []
    assert teacher.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    acam_kd.distill(model, teacher, method="Cosine", teacher_levels={"p4": "blocks.1"}, student_levels=["p4"])
    teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with EventStorage():
        model(batch)
    assert seen[0].shape == (2, 3, 96, 96)
    for got, x in zip(seen[0], batch):
        rgb = x["image"].flip(0) if order == "BGR" else x["image"]
        torch.testing.assert_close(got[:, :70, :90], normalised(teacher, rgb / 255), rtol=1e-4, atol=1e-4)


def test_unknown_pixels_are_a_warning_and_can_be_said(caplog):
    teacher, seen = vit(), []
    del teacher.pretrained_cfg
    kind = {"method": "Cosine", "teacher_levels": {"p4": "blocks.1"}, "student_levels": ["p4"]}
    acam_kd.distill(student(), teacher, **kind)
    assert "the pixel statistics of the teacher, a VisionTransformer, are unknown" in caplog.text
    assert "teacher_pixels" in caplog.text
    caplog.clear()
    said = acam_kd.Pixels([0.4, 0.5, 0.6], [0.1, 0.2, 0.3], "RGB", white=1.0)
    model = acam_kd.distill(student(), teacher, teacher_pixels=said, **kind)
    assert "unknown" not in caplog.text
    teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    batch = inputs(1, size=(64, 96))
    with EventStorage():
        model(batch)
    mean, std = torch.tensor([[0.4, 0.5, 0.6], [0.1, 0.2, 0.3]])[..., None, None]
    wanted = (batch[0]["image"].flip(0) / 255 - mean) / std
    torch.testing.assert_close(seen[0][0], wanted, rtol=1e-4, atol=1e-4)


def test_patches_of_14_pixels_are_brought_to_the_grid_of_a_level(caplog):
    """A batch of 96 x 128 has no whole number of such patches: the teacher sees 98 x 126."""
    caplog.set_level("INFO")
    model, teacher, seen, maps = student(), vit(14, registers=0), [], []
    acam_kd.distill(model, teacher, method="Cosine", teacher_levels={"p4": "blocks.1"}, student_levels=["p4"])
    assert "at p4 the teacher's map (stride 14) is resized to the student's grid (stride 16)" in caplog.text
    teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model.distillation.method.register_forward_pre_hook(lambda module, args: maps.extend(x["p4"] for x in args[:2]))
    with EventStorage():
        model(inputs(size=(90, 120)))
    assert seen == [(2, 3, 98, 126)] and [x.shape[2:] for x in maps] == [(6, 8), (6, 8)]


def test_a_network_of_one_size_is_refused_by_name():
    import timm

    teacher = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=12, num_heads=2).eval()
    model = acam_kd.distill(
        student(), teacher, method="Cosine", teacher_levels={"p4": "blocks.0"}, student_levels=["p4"]
    )
    with (
        EventStorage(),
        refused("teacher", r"a failure on the student's batch \(2, 3, 64, 96\)", "", "dynamic_img_size"),
    ):
        model(inputs())


def test_levels_without_a_partner_are_named():
    with refused("levels", "a partner for 1 of 5 levels", "most of them", "name those to distil"):
        acam_kd.distill(student(), vit(), method="Cosine", teacher_levels={"p4": "blocks.1"})
    with refused("levels", "p3", "levels whose stride the teacher has too"):
        acam_kd.distill(
            student(), vit(), method="Cosine", teacher_levels={"p4": "blocks.1"}, student_levels=["p3", "p4"]
        )


def test_a_method_that_cannot_align_widths_refuses_them():
    with refused("PKD.levels", "p4 with 16 channels in the student and 24 in the teacher"):
        acam_kd.distill(student(), vit(), method="PKD", teacher_levels={"p4": "blocks.1"}, student_levels=["p4"])
