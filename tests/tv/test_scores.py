"""The scores of torchvision's detectors, for methods that need them."""

from __future__ import annotations

import copy

import pytest
import torch

from acam_kd.core import ConfigError, Plan
from acam_kd.tv.adapter import adapt
from acam_kd.tv.distillation import build_distillation
from acam_kd.tv.models import build_model

from .test_class_heads import HEADS, IMAGES, TARGETS, build, model, spy, teacher_of

KINDS = {**HEADS, "ssd": "ssdlite320_mobilenet_v3_large"}


def awake(detector):
    """A head whose convolutions pass something on; from its start of 0.01 almost nothing comes through."""
    head = detector.rpn.head if hasattr(detector, "rpn") else detector.head.classification_head
    for module in head.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return detector.eval()


def scored(name, size=64):
    """A student, the same model with other weights as its teacher, and what the method is given."""
    student, teacher = (build_model(name, num_classes=4, size=size) for _ in "ab")
    build_distillation(student, teacher, Plan(methods={"ScoreWeighted": {"alpha": 1.0}}))
    return student.train(), teacher, spy(student)


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_with_every_detector(kind):
    student, teacher, seen = scored(KINDS[kind])
    before = copy.deepcopy(teacher.state_dict())
    losses = student(IMAGES, TARGETS)
    assert losses["loss_scoreweighted_mse"] > 0 and losses["loss_scoreweighted_mse"].isfinite()
    losses["loss_scoreweighted_mse"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.backbone.parameters())
    assert all(p.grad.abs().sum() > 0 for p in student.distillation.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
    ((maps, _, targets),) = seen
    for level, x in maps.items():
        scores = targets.scores[level]
        assert scores.shape == (len(x), 1, *x.shape[2:]) and scores.min() >= 0 and scores.max() <= 1
        assert not scores.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_hot_place_of_the_map_has_the_score(kind):
    """Only one place of the first level is not 0, so the scores differ from the others' around it and nowhere else."""
    detector = awake(build_model(KINDS[kind], num_classes=4, size=64))
    side = 320 if kind == "ssd" else 128
    with torch.no_grad():
        features = {k: torch.zeros_like(v) for k, v in detector.backbone(torch.zeros(1, 3, side, side)).items()}
        first = next(iter(features))
        height, width = features[first].shape[2:]
        features[first][0, :, height - 2, 1] = 5.0
        scores = adapt(detector).read_scores(detector, features)
    away = (scores[first][0, 0] - scores[first][0, 0, 0, width - 1]).abs()
    place = away.argmax().item()
    assert abs(place // width - (height - 2)) <= 3 and abs(place % width - 1) <= 3 and away.max() > 1e-3
    others = [level for level in features if level != first]
    assert all(scores[level].shape[2:] == features[level].shape[2:] for level in others)


@pytest.mark.parametrize("kind", ["fcos", "retinanet"])
def test_the_score_is_the_largest_sigmoid_at_its_place(kind):
    detector = awake(model(HEADS[kind]))
    with torch.no_grad():
        shapes = {level: x.shape for level, x in detector.backbone(torch.zeros(2, 3, 64, 96)).items()}
        features = {level: torch.randn(shape) for level, shape in shapes.items()}
        scores = adapt(detector).read_scores(detector, features)
        for level, x in features.items():
            hidden = detector.head.classification_head.conv(x)
            logits = detector.head.classification_head.cls_logits(hidden)
            torch.testing.assert_close(scores[level], logits.sigmoid().amax(1, keepdim=True))
    assert scores["0"].std() > 1e-4


def test_the_background_of_a_softmax_is_left_out():
    detector = build_model(KINDS["ssd"], num_classes=4).eval()
    with torch.no_grad():
        for head in detector.head.classification_head.module_list:
            last = head[-1]
            last.weight.zero_()
            last.bias.copy_(torch.tensor([50.0, 1, 2, 3]).repeat(len(last.bias) // 4))
        features = detector.backbone(torch.rand(1, 3, 320, 320))
        scores = adapt(detector).read_scores(detector, features)
    assert all(x.max() < 1e-15 for x in scores.values())


def test_objectness_of_an_rcnn():
    detector = awake(model(HEADS["faster rcnn"]))
    with torch.no_grad():
        features = detector.backbone(torch.rand(2, 3, 64, 96))
        scores = adapt(detector).read_scores(detector, features)
        objectness, _ = detector.rpn.head(list(features.values()))
    for x, y in zip(scores.values(), objectness):
        torch.testing.assert_close(x, y.sigmoid().max(1, keepdim=True)[0])


def test_beside_a_method_of_the_class_head():
    built = build("fcos", "ScoreWeighted+KD+Mimic")
    losses = built(IMAGES, TARGETS)
    assert {"loss_scoreweighted_mse", "loss_kd_kl", "loss_mimic_mse"} <= losses.keys()
    sum(losses.values()).backward()
    assert teacher_of(built) is not None


def test_student_and_teacher_may_be_of_two_kinds():
    student, teacher = model(HEADS["fcos"]), model("retinanet_mobilenet_v3_small_fpn32", classes=7)
    build_distillation(student, teacher, Plan(methods={"ScoreWeighted": {}}))
    assert student.train()(IMAGES, TARGETS)["loss_scoreweighted_mse"] > 0


def test_a_segmentor_is_refused_by_name():
    student, teacher = (build_model("lraspp_mobilenet_v3_large", num_classes=4) for _ in "ab")
    with pytest.raises(ConfigError) as error:
        build_distillation(student, teacher, Plan(methods={"ScoreWeighted": {}}))
    assert (error.value.argument, error.value.value) == ("method", "ScoreWeighted")
    assert "a LRASPP does not score positions" in error.value.hint
    assert not hasattr(student, "distillation")
