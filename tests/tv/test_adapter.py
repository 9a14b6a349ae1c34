"""Distillation of segmentation models on the maps that they predict."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torchvision

from acam_kd.core import BACKBONE, LOGITS, Plan
from acam_kd.methods import Mimic
from acam_kd.tv.adapter import adapt
from acam_kd.tv.build import build
from acam_kd.tv.data import CocoImages
from acam_kd.tv.distillation import build_distillation, normalized_batch
from acam_kd.tv.models import build_model, plain
from acam_kd.tv.training import train

from .conftest import refuses

LRASPP, DEEPLAB, FCN = "lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "fcn_resnet50"
IMAGES = [torch.rand(3, 64, 96), torch.rand(3, 96, 64)]
TARGETS = [{"semantic": torch.randint(0, 4, image.shape[1:])} for image in IMAGES]


def model(name, classes=4):
    return build_model(name, num_classes=classes, size=64)


def distil(student, teacher, method="Mimic", **arguments):
    """Return the student, with its distillation if there is a method."""
    plan = Plan(methods={method: {}} if method else {}, **{"inherit": "auto", **arguments})
    assert build_distillation(student, teacher, plan) is getattr(student, "distillation", None)
    return student


def logits_of(network, batch):
    """Return the logits of torchvision's own forward, before it upsamples."""
    seen = []
    handle = network.classifier.register_forward_hook(lambda module, args, out: seen.append(out))
    network(batch)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", [LRASPP, DEEPLAB])
def test_mimicking_is_the_squared_difference_of_what_the_classifiers_give(name):
    """Student and teacher of one stride: nothing is resized."""
    student, teacher = model(name), model(name)
    built = distil(student, teacher)
    assert built.distillation.levels == {"logits": "logits"} and not list(built.distillation.method.parameters())
    seen = []
    handle = plain(student).classifier.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.random.fork_rng():
        losses = built.train()(IMAGES, TARGETS)
    handle.remove()
    with torch.no_grad():
        wanted = logits_of(plain(teacher).eval(), student.batch(IMAGES))
    alpha = built.distillation.method.alpha
    torch.testing.assert_close(losses["loss_mimic_mse"], alpha * (seen[0] - wanted).square().mean())
    losses["loss_mimic_mse"].backward()
    assert all(p.grad is not None for p in plain(student).classifier.parameters())


@pytest.mark.parametrize("method", ["Mimic", "ACAMKD"])
def test_a_student_of_another_stride_learns_from_a_resized_map(method):
    student, teacher = model(LRASPP), model(DEEPLAB)
    before = {name: value.clone() for name, value in plain(teacher).state_dict().items()}
    built = distil(student, teacher, method).train()
    losses = built(IMAGES, TARGETS)
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None for p in built.parameters())
    assert all(torch.equal(before[name], value) for name, value in plain(teacher).state_dict().items())
    assert all(p.grad is None for p in teacher.parameters()) and all(m.training for m in teacher.modules())
    assert all(p.requires_grad for p in teacher.parameters())
    assert not any("teacher" in name for name in (*built.state_dict(), *dict(built.named_parameters())))


def test_masks_can_be_observed_and_are_as_many_as_classes():
    built = distil(model(LRASPP), model(DEEPLAB), "ACAMKD").train()
    batch, _ = normalized_batch(built, IMAGES[:1])
    masks = built.distillation.observe(batch)
    assert list(masks) == ["logits"] and masks["logits"]["spatial"].shape == (1, 4, 8, 12)
    assert masks["logits"]["channel"].shape == (1, 4, 4)
    assert adapt(built).levels((BACKBONE, LOGITS), side=64)["logits"].stride == 8
    assert built.distillation.shapes["student"]["logits"].stride == 8 and all(m.training for m in built.modules())


def test_the_demos_observer_keeps_them_with_their_stride(data, tmp_path, monkeypatch):
    from acam_kd.tv import demo

    kept = []
    monkeypatch.setattr(demo, "keep_masks", lambda *arguments: kept.append(arguments))
    built = distil(model(LRASPP), model(DEEPLAB), "ACAMKD").train()
    demo._observer(tmp_path, [next((data / "val").iterdir())])(built, 3)
    (_, step, number, masks, strides), *others = kept
    assert (step, number, strides, others) == (3, 0, {"logits": 8}, []) and masks["logits"]["spatial"].shape == (
        4,
        8,
        8,
    )


def test_the_backbone_can_be_tapped_instead_or_too():
    student, teacher = model(LRASPP), model(DEEPLAB, classes=9)
    built = distil(student, teacher, "ACAMKD", taps=["backbone"])
    assert built.distillation.levels == {"high": "out"} and "loss_acam_channel" in built.train()(IMAGES, TARGETS)
    built.distillation.remove()
    built = distil(student, model(DEEPLAB), "ACAMKD", taps=["logits", "backbone"])
    assert built.distillation.levels == {"high": "out", "logits": "logits"}
    built.train()(IMAGES, TARGETS)
    masks = built.distillation.masks()
    assert {level: kinds["spatial"].shape[1] for level, kinds in masks.items()} == {"high": 6, "logits": 4}


def test_a_tap_that_no_method_reads_is_refused():
    with refuses("taps", "backbone", "only classes and logits with KD", "see {method}"):
        distil(model(LRASPP), model(DEEPLAB), "KD", taps=["logits", "backbone"])


def test_nothing_is_inherited_unless_asked_for():
    """The paper's segmentation rows have no inheritance."""
    student, teacher = model(LRASPP), model(LRASPP)
    distil(student, teacher, "")
    own, other = plain(student).classifier.low_classifier, plain(teacher).classifier.low_classifier
    assert not torch.equal(own.weight, other.weight)
    distil(student, teacher, "", inherit="always")
    assert torch.equal(own.weight, other.weight)
    assert not torch.equal(plain(student).backbone["0"][0].weight, plain(teacher).backbone["0"][0].weight)


@pytest.mark.parametrize(
    ("student", "teacher", "taps", "error"),
    [
        (LRASPP, (DEEPLAB, 9), [], ("teacher", "9 classes at logits", "the student's 4", "by {taps}")),
        (
            LRASPP,
            "fcos_resnet18_fpn32",
            [],
            ("taps", "logits", "backbone or classes of the teacher, a FCOS"),
        ),
        (
            "fcos_resnet18_fpn32",
            "fcos_resnet18_fpn32",
            ["logits"],
            ("taps", "logits", "backbone or classes of the student, a FCOS"),
        ),
        (LRASPP, DEEPLAB, ["neck"], ("taps", "neck", "a list of backbone, logits, classes")),
    ],
)
def test_maps_that_do_not_correspond_are_refused(student, teacher, taps, error):
    teacher = model(*teacher) if isinstance(teacher, tuple) else model(teacher)
    with refuses(*error):
        distil(model(student), teacher, taps=taps)


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """The folder of a finished run of DeepLabV3."""
    from .conftest import tiny

    folder = tmp_path_factory.mktemp("runs") / "deeplab"
    train(replace(tiny(data), student=DEEPLAB, iterations=1), folder)
    return folder


def test_a_run_leaves_what_plain_torchvision_loads(settings, teacher, tmp_path):
    asked = replace(settings, student=LRASPP, teacher=str(teacher), method="ACAMKD", inherit="auto", iterations=2)
    result = train(asked, tmp_path / "run")
    assert 0 <= result["metrics"]["mIoU"] <= 100
    state = torch.load(tmp_path / "run/student.pth", weights_only=True)
    torchvision.models.segmentation.lraspp_mobilenet_v3_large(num_classes=7, weights_backbone=None).load_state_dict(
        state
    )
    assert json.loads((tmp_path / "run/settings.json").read_text())["taps"] == []


def test_other_categories_than_the_teachers_are_compared_by_name(settings, teacher, tmp_path):
    """As many, so that shapes say nothing."""
    card = json.loads((teacher / "student.json").read_text())
    names = card["categories"]
    card["categories"] = {**names, "1": names["2"], "2": names["1"]}
    other = tmp_path / "other"
    other.mkdir()
    (other / "student.json").write_text(json.dumps(card))
    (other / "student.pth").symlink_to(teacher / "student.pth")
    asked = replace(settings, student=LRASPP, teacher=str(other), method="Mimic")
    data = CocoImages(asked.train_split, semantic=True)
    assert build(asked, data).distillation.classes["logits"].teacher == (0, 2, 1, 3, 4, 5, 6)
    assert build(replace(asked, teacher=str(teacher)), data).distillation.classes == {}
    assert isinstance(build(replace(asked, taps=("backbone",)), data).distillation.method, Mimic)
