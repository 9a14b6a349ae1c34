"""The scores of Detectron2's detectors, for methods that need them."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model

from acam_kd.d2.adapter import adapt

from .conftest import distillation_config, inputs, refused, save_config
from .test_class_heads import C4, CASCADE, HEADS, build, config, spy
from .test_segmentation import segmentor

KINDS = {
    "retinanet": config("retinanet"),
    "fcos": config("fcos"),
    "faster rcnn": config("faster rcnn"),
    "cascade": config("faster rcnn", *CASCADE),
    "C4": config("faster rcnn", *C4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_with_every_detector(kind, tmp_path, storage):
    student = build(tmp_path, KINDS[kind], None, "ScoreWeighted", "DISTILL.SCOREWEIGHTED.ALPHA", 1.0)
    seen = spy(student)
    losses = student(inputs())
    assert losses["loss_scoreweighted_mse"] > 0 and losses["loss_scoreweighted_mse"].isfinite()
    losses["loss_scoreweighted_mse"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.backbone.parameters())
    ((maps, _, targets),) = seen
    for level, x in maps.items():
        assert targets.scores[level].shape == (len(x), 1, *x.shape[2:])
        assert targets.scores[level].min() >= 0 and targets.scores[level].max() <= 1


@pytest.mark.parametrize("kind", HEADS)
def test_the_score_is_the_largest_at_its_place(kind):
    torch.manual_seed(0)
    detector = build_model(config(kind)).eval()
    head = detector.head if hasattr(detector, "head") else detector.proposal_generator.rpn_head
    last = getattr(head, "cls_score", None) or head.objectness_logits
    torch.nn.init.normal_(last.weight, std=0.5)
    with torch.no_grad():
        features = detector.backbone(torch.randn(2, 3, 64, 96))
        scores = adapt(detector).read_scores(detector, features)
        for level, found in scores.items():
            hidden = head.cls_subnet(features[level]) if hasattr(head, "cls_subnet") else head.conv(features[level])
            torch.testing.assert_close(found, last(hidden).sigmoid().amax(1, keepdim=True))
    assert max(x.std() for x in scores.values()) > 1e-4


def test_a_segmentor_is_refused_by_name(tmp_path):
    path = save_config(segmentor(), tmp_path / "teacher.yaml")
    cfg = distillation_config(segmentor(), path, "DISTILL.METHOD", "ScoreWeighted")
    with refused("method", "ScoreWeighted", hint="a SemanticSegmentor does not score positions"):
        build_model(cfg)
