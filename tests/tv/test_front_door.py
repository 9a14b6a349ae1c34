"""``acam_kd.distill`` with torchvision's own models: a student stays the student."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F  # noqa: N812

import acam_kd
from acam_kd.core.errors import ConfigError
from acam_kd.tv.models import build_model

from .conftest import snapshot

K = 4  # with the background
DETECTORS = {
    "retinanet": "retinanet_mobilenet_v3_small_fpn32",
    "fcos": "fcos_mobilenet_v3_small_fpn32",
    "fasterrcnn": "fasterrcnn_mobilenet_v3_small_fpn32",
    "maskrcnn": "maskrcnn_mobilenet_v3_small_fpn32",
}
LRASPP = "lraspp_mobilenet_v3_large"
HEADS = {
    **dict.fromkeys(("retinanet", "fcos", "ssdlite"), "head"),
    **dict.fromkeys(("fasterrcnn", "maskrcnn"), "roi_heads"),
    **dict.fromkeys(("lraspp", "mobilenet_v3_small"), "classifier"),
    "segmentor": "network.classifier",
    "resnet18": "fc",
}
"""Kind -> what runs after all the features."""
WAITING = ("lraspp", "resnet18", "mobilenet_v3_small")
"""The kinds whose output cannot carry losses."""
CASES = [(kind, method) for kind in HEADS for method in ("PKD", "KD", "CWD", "ACAMKD")]
CASES = [case for case in CASES if case != ("ssdlite", "KD")]  # SSD's class head is not distilled
IMAGES = [torch.rand(3, 64, 96), torch.rand(3, 96, 64)]
BATCH = torch.rand(2, 3, 64, 64)


@functools.lru_cache(None)
def built(kind):
    torch.manual_seed(3)
    if kind in DETECTORS:
        model = build_model(DETECTORS[kind], num_classes=K, size=64)
        if kind.endswith("rcnn"):
            model.roi_heads.fg_bg_sampler.batch_size_per_image = 16  # quicker
        return model
    if kind == "segmentor":
        return build_model(LRASPP, num_classes=K, size=64)
    if kind == "ssdlite":
        name = "ssdlite320_mobilenet_v3_large"
        return torchvision.models.get_model(name, num_classes=K, weights_backbone=None)
    if kind == "lraspp":
        return torchvision.models.get_model(LRASPP, num_classes=K, weights_backbone=None)
    return torchvision.models.get_model(kind, num_classes=K)


FORWARDS = ("cell_anchors", "scales", "map_levels")
"""Attributes that torchvision's modules write in a forward."""


def plain(kind):
    return copy.deepcopy(built(kind))


def distilled(kind, method, **arguments):
    student = plain(kind)
    teacher = plain(kind)
    with torch.no_grad():  # one that knows something else
        for parameter in teacher.parameters():
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    assert acam_kd.distill(student, teacher, method=method, **arguments) is student
    return student


def outputs(kind, model):
    """Run the model in training as its users do."""
    if kind in WAITING:
        return model(BATCH)
    boxes = torch.tensor([[5.0, 5, 50, 50], [20, 10, 60, 40]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 3])} for _ in IMAGES]
    if kind == "maskrcnn":
        for target, image in zip(targets, IMAGES):
            target["masks"] = torch.ones(2, *image.shape[1:], dtype=torch.uint8)
    if kind == "segmentor":
        targets = [{"semantic": torch.arange(image[0].numel()).view(image[0].shape) % K} for image in IMAGES]
    return model(IMAGES, targets)


def step(kind, student):
    """Make a training step, up to the gradients, and return the losses of the method."""
    found = outputs(kind, student)
    if kind == "lraspp":
        assert list(found) == ["out"]
        total = F.cross_entropy(found["out"], torch.zeros(2, 64, 64, dtype=torch.long))
    elif kind in WAITING:
        total = F.cross_entropy(found, torch.tensor([0, 1]))
    else:
        assert set(student.distillation.losses) < set(found)
        total = sum(found.values())
    losses = student.distillation.losses
    if kind in WAITING:
        total = total + sum(losses.values())
    total.backward()
    return losses


def failing_step(kind, student):
    """Fail after the features were made."""

    def fail(*_):
        raise FloatingPointError("on the way")

    handle = student.get_submodule(HEADS[kind]).register_forward_pre_hook(fail)
    with pytest.raises(FloatingPointError, match="on the way"):
        outputs(kind, student)
    handle.remove()


def settled(model):
    """A snapshot without what torchvision itself writes in a forward."""
    return {
        name: {key: value for key, value in content.items() if key not in FORWARDS}
        for name, content in snapshot(model).items()
    }


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_the_student_stays_the_student(kind, method):
    original, student = plain(kind), distilled(kind, method).train()
    assert type(student) is type(original) and isinstance(student.distillation, acam_kd.core.Distillation)
    names = [name for name, _ in student.named_parameters()]
    theirs = [name for name in names if name.startswith("distillation.")]
    assert names == [*dict(original.named_parameters()), *theirs]
    assert len(theirs) == len(list(student.distillation.method.parameters()))
    step(kind, student)
    for model in (student, student.eval()):
        state = model.state_dict()
        assert (
            list(state) == list(original.state_dict())
            and state._metadata.keys() >= original.state_dict()._metadata.keys()
        )
        assert all(value.shape == original.state_dict()[name].shape for name, value in state.items())
    for name, parameter in student.named_parameters():
        if name in theirs and parameter.requires_grad:
            assert parameter.grad is not None, name


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_checkpoints_are_exchanged_with_plain_models(kind, method, tmp_path):
    torch.save(plain(kind).state_dict(), tmp_path / "plain.pth")
    student = distilled(kind, method).train()
    learnt = {name: value.clone() for name, value in student.distillation.state_dict().items()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    found = student.load_state_dict(torch.load(tmp_path / "plain.pth"), strict=True)
    assert not found.missing_keys and not found.unexpected_keys
    assert all(torch.equal(a, b) for a, b in zip(student.state_dict().values(), plain(kind).state_dict().values()))
    now = student.distillation.state_dict()
    assert now.keys() == learnt.keys() and all("teacher" not in name for name in now)
    moved = [name for name, value in now.items() if value.is_floating_point() and torch.equal(value, learnt[name])]
    assert not set(moved) & {name for name, _ in student.distillation.method.named_parameters()}  # left alone
    step(kind, student)
    torch.save(student.state_dict(), tmp_path / "student.pth")
    plain(kind).load_state_dict(torch.load(tmp_path / "student.pth"), strict=True)
    broken = dict(list(student.state_dict().items())[1:])
    with pytest.raises(RuntimeError, match="Missing key"):
        student.load_state_dict(broken)


@pytest.mark.slow
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@pytest.mark.parametrize(("kind", "method"), CASES)
def test_copies_after_a_step_and_after_one_that_raised(kind, method, duplicate):
    student = distilled(kind, method).train()
    before = step(kind, student)
    for spoil in (lambda: None, lambda: failing_step(kind, student)):
        spoil()
        student.zero_grad()
        twin = duplicate(student)
        assert type(twin) is type(student) and twin.distillation is not student.distillation
        assert twin.distillation.method is not student.distillation.method
        shared = twin.distillation.teacher.network is student.distillation.teacher.network
        assert shared == (duplicate is copy.deepcopy)
        losses = step(kind, twin)
        assert losses.keys() == before.keys() and all(loss.isfinite() for loss in losses.values())
        assert any(p.grad is not None for p in twin.parameters())
        assert all(p.grad is None for p in student.parameters())
        assert all(a is not b for a, b in zip(twin.parameters(), student.parameters()))
        assert step(kind, student).keys() == before.keys()
        assert list(twin.state_dict()) == list(student.state_dict())
        twin.distillation.remove()
        assert "distillation" in dict(student.named_children())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "method"), CASES)
def test_remove_restores_every_module_exactly(kind, method):
    student = plain(kind)
    before = settled(student)
    teacher = plain(kind)
    of_teacher = settled(teacher), {name: value.clone() for name, value in teacher.state_dict().items()}
    acam_kd.distill(student, teacher, method=method)
    assert settled(student) != before
    student.distillation.remove()
    assert settled(student) == before and not hasattr(student, "distillation")
    acam_kd.distill(student, teacher, method=method)
    step(kind, student)
    failing_step(kind, student)
    step(kind, student)
    attached = student.distillation
    attached.remove()
    attached.remove()  # twice is once
    assert settled(student) == before
    for module in student.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and not module._forward_hooks_with_kwargs
        assert not module._forward_hooks_always_called and not module._forward_pre_hooks_with_kwargs
        assert all(type(value).__module__.partition(".")[0] != "acam_kd" for value in vars(module).values())
    assert settled(teacher) == of_teacher[0]
    assert all(torch.equal(of_teacher[1][name], value) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("kind", HEADS)
def test_in_evaluation_and_under_no_grad_nothing_happens(kind):
    original, student = plain(kind).train(), distilled(kind, "PKD").train()
    student.distillation.teacher.network = None  # would fail, if it were asked
    with torch.no_grad():
        torch.manual_seed(1)  # regions are drawn
        found = outputs(kind, student)
        torch.manual_seed(1)
        wanted = outputs(kind, original)
        torch.testing.assert_close(found, wanted)
        images = BATCH if kind in WAITING else IMAGES
        torch.testing.assert_close(student.eval()(images), original.eval()(images))
    assert not student.distillation.losses


@pytest.mark.parametrize("kind", WAITING)
def test_losses_that_nobody_adds_are_an_error(kind):
    student = distilled(kind, "KD").train()
    outputs(kind, student)
    with pytest.raises(ConfigError) as error:
        outputs(kind, student)
    assert error.value.argument == "student" and "which nobody used" in error.value.value
    assert "sum(student.distillation.losses.values())" in error.value.hint


def test_methods_that_do_not_fit_are_refused_and_leave_nothing():
    for kind, method, argument in (("ssdlite", "KD", "student"), ("lraspp", "FGD", "method"), ("fcos", "X", "method")):
        student = plain(kind)
        before = settled(student)
        with pytest.raises(ConfigError) as error:
            acam_kd.distill(student, plain(kind), method=method)
        assert error.value.argument == argument and settled(student) == before


def test_annotations_that_never_come_are_an_error_in_the_first_step():
    student = plain("resnet18")
    before = settled(student)
    acam_kd.distill(student, plain("resnet18"), method="FGD")
    with pytest.raises(ConfigError) as error:
        outputs("resnet18", student)
    assert (error.value.argument, error.value.value) == ("targets", "no boxes") and "{targets}" in error.value.hint
    student.distillation.remove()
    assert settled(student) == before


def test_a_teacher_of_another_kind_and_levels_by_name():
    student = plain("fcos")
    acam_kd.distill(student, plain("retinanet"), method="PKD", student_levels=["0", "1"], alpha=3.0)
    assert student.distillation.levels == {"0": "0", "1": "1"} and student.distillation.method.alpha == 3
    with pytest.raises(ConfigError, match="one that has a distillation"):
        acam_kd.distill(student, plain("retinanet"), method="PKD")
    assert list(step("fcos", student.train())) == ["loss_pkd_pearson"]


def test_two_students_share_a_teacher_and_one_is_a_part_of_a_larger_model():
    class Larger(nn.Module):
        def __init__(self, student):
            super().__init__()
            self.student, self.more = student, nn.Linear(K, 2)

        def forward(self, batch):
            return self.more(self.student(batch))

    teacher, students = plain("resnet18"), [plain("resnet18") for _ in range(2)]
    for student in students:
        acam_kd.distill(student, teacher, method="KD")
    larger = Larger(students[0])
    larger(BATCH).sum().backward()
    assert list(students[0].distillation.losses) == ["loss_kd_kl"] and not students[1].distillation.losses
    assert not any("distillation" in name for name in larger.state_dict())
    larger.load_state_dict(larger.state_dict(), strict=True)
    students[0].distillation.remove()
    assert list(step("resnet18", students[1])) == ["loss_kd_kl"] and all(m.training for m in teacher.modules())
