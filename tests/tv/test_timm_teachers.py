"""Networks of timm as teachers of torchvision's detectors and segmentation models."""

from __future__ import annotations

import pytest
import torch

import acam_kd
from acam_kd.tv.models import build_model

from ..timm_teachers import TEACHERS, normalised, vit
from .conftest import STUDENT, refuses

IMAGES = [torch.rand(3, 70, 90), torch.rand(3, 64, 96)]
OBJECTS = [{"boxes": torch.tensor([[5.0, 5.0, 50.0, 50.0]]), "labels": torch.tensor([1])}] * 2
LEVELS = {"p3": "0", "p4": "1", "p5": "2"}
"""Names in this table of teachers -> those of torchvision's FPN."""


def student(name=STUDENT):
    torch.manual_seed(0)
    return build_model(name, num_classes=3, size=64).train()


@pytest.mark.parametrize("name", TEACHERS)
def test_it_teaches_levels_of_an_fpn(name):
    build, levels, strides = TEACHERS[name]
    model, teacher = student(), build()
    strided = {spec: level for level, spec in strides.items()}
    names = [LEVELS[level] for level in strided.values()]
    levels = {LEVELS[level]: path for level, path in levels.items()}
    acam_kd.distill(model, teacher, method="Cosine", teacher_levels=levels, student_levels=names)
    assert [spec.stride for spec in model.distillation.shapes["teacher"].values()] == list(strided)
    losses = model(IMAGES, OBJECTS)
    losses["loss_cosine_distance"].backward()
    assert 0 < losses["loss_cosine_distance"].detach() < 2 * len(names)
    assert all(p.grad is None for p in teacher.parameters())
    assert next(model.backbone.parameters()).grad.abs().sum() > 0


def test_its_own_pixels_are_honoured():
    model, teacher, seen, given = student(), vit(), [], []
    acam_kd.distill(model, teacher, method="Cosine", teacher_levels={"1": "blocks.1"}, student_levels=["1"])
    teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.backbone.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    model(IMAGES, OBJECTS)
    mean, std = (torch.tensor(x)[:, None, None] for x in (model.transform.image_mean, model.transform.image_std))
    torch.testing.assert_close(seen[0], normalised(teacher, given[0] * std + mean), rtol=1e-4, atol=1e-5)


def test_a_segmentation_model_learns_from_a_plain_vit():
    model = student("deeplabv3_mobilenet_v3_large")
    acam_kd.distill(model, vit(14), method="Cosine", teacher_levels={"out": "blocks.1"}, student_levels=["out"])
    labels = [{"semantic": torch.zeros(image.shape[1:], dtype=torch.long)} for image in IMAGES]
    losses = model(IMAGES, labels)
    losses["loss_cosine_distance"].backward()
    assert next(model.parameters()).grad.abs().sum() > 0


def test_a_detector_with_levels_by_path_knows_its_pixels():
    """The example is torchvision's own argument, a list of images; the teacher gets what the backbone is given."""
    model, teacher, seen, given = student(), vit(), [], []
    levels = {"student_levels": {"c": "backbone[1]"}, "teacher_levels": {"c": "blocks.1"}}
    example = ([torch.rand(3, 224, 224)],)
    acam_kd.distill(model, teacher, method="Cosine", example_inputs=example, **levels)
    teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.backbone.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    losses = model(IMAGES, OBJECTS)
    mean, std = (torch.tensor(x)[:, None, None] for x in (model.transform.image_mean, model.transform.image_std))
    torch.testing.assert_close(seen[0], normalised(teacher, given[0] * std + mean), rtol=1e-4, atol=1e-5)
    losses["loss_cosine_distance"].backward()
    assert next(model.backbone.parameters()).grad.abs().sum() > 0
    model.distillation.remove()
    with refuses("student_levels", "c: backbone.bodi", "a submodule, as backbone.body"):
        acam_kd.distill(model, teacher, method="Cosine", **{**levels, "student_levels": {"c": "backbone.bodi"}})
