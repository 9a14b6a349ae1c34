"""Predictions are compared where student and teacher know the same classes, as far as their data says."""

from __future__ import annotations

import pytest
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

from .conftest import distillation_config, refused

NAMES = {"names_own": ["a", "b", "c"], "names_same": ["a", "b", "c"], "names_order": ["b", "a", "c"]}


@pytest.fixture(autouse=True)
def datasets():
    for name, classes in NAMES.items():
        MetadataCatalog.get(name).thing_classes = classes
    yield
    for name in NAMES:
        MetadataCatalog.remove(name)


def build(student, teacher, data, method="KD"):
    opts = ["DATASETS.TRAIN", '("names_own",)', "DISTILL.METHOD", method]
    cfg = distillation_config(student, teacher, *opts)
    cfg.DISTILL.TEACHER.OPTS = ["DATASETS.TRAIN", f'("{data}",)']
    return build_model(cfg)


@pytest.mark.parametrize("kind", ["retinanet", "rcnn"])
def test_the_same_names_in_the_same_order(kind, request):
    pair = request.getfixturevalue(kind), request.getfixturevalue(f"{kind}_teacher")
    assert build(*pair, "names_same").distillation.levels["classes"] == "classes"
    with refused("teacher", "the classes b, a, c", "the student's a, b, c", "{method} and {taps}"):
        build(*pair, "names_order")
    assert "classes" not in build(*pair, "names_order", "Mimic").distillation.levels


@pytest.mark.parametrize("kind", ["retinanet", "rcnn"])
def test_names_of_other_data_than_the_teachers(kind, request):
    """Its base's: COCO has 80, the teacher 3."""
    pair = request.getfixturevalue(kind), request.getfixturevalue(f"{kind}_teacher")
    assert "classes" in build(*pair, "coco_2017_train").distillation.levels
