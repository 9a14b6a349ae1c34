"""Predictions are compared on the classes that student and teacher both know, by the names of their data."""

from __future__ import annotations

import logging

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

from acam_kd.core import FrozenTeacher
from acam_kd.core.classes import CommonClasses
from acam_kd.methods.kd import binary_kd_loss, kd_loss

from .conftest import detector_config, distillation_config, inputs, refused, save_config
from .test_segmentation import labelled, segmentor

NAMES = {
    "names_own": ["person", "car", "dog"],
    "names_same": ["person", "car", "dog"],
    "names_order": ["car", "person", "dog"],
    "names_new": ["person", "tram", "dog"],
    "names_other": ["Mensch", "Auto", "Hund"],
}
COCO = (0, 2, 16)
"""The places of person, car and dog among COCO's 80."""
BASES = {"retinanet": "Base-RetinaNet.yaml", "rcnn": "Base-RCNN-FPN.yaml", "sigmoid": "Base-RCNN-FPN.yaml"}


@pytest.fixture(autouse=True)
def datasets():
    for name, classes in NAMES.items():
        MetadataCatalog.get(name).set(thing_classes=classes, stuff_classes=[*classes, "sky", "sea"])
    yield
    for name in NAMES:
        MetadataCatalog.remove(name)


def config(kind, data, classes=3):
    opts = ["MODEL.RETINANET.NUM_CLASSES", classes, "MODEL.ROI_HEADS.NUM_CLASSES", classes]
    opts += ["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", kind == "sigmoid", "MODEL.RESNETS.NORM", ""]
    return detector_config(BASES[kind], "DATASETS.TRAIN", (data,), *opts)


def build(tmp_path, student, teacher, method="KD", *opts):
    path = save_config(teacher, tmp_path / "teacher.yaml")
    return build_model(distillation_config(student, path, "DISTILL.METHOD", method, *opts)).train()


def spy(model, monkeypatch):
    """Record the inputs of the method, and the teacher's features before they are reduced."""
    seen, whole = [], []
    model.distillation.method.register_forward_pre_hook(lambda module, args: seen.append(args))
    ask = FrozenTeacher.__call__
    monkeypatch.setattr(FrozenTeacher, "__call__", lambda *args: whole.append(ask(*args)) or whole[-1])
    return seen, whole


def class_layer(model):
    return model.head.cls_score if hasattr(model, "head") else model.roi_heads.box_predictor.cls_score


@pytest.mark.parametrize("kind", BASES)
def test_a_teacher_of_coco_teaches_three_of_its_classes(kind, tmp_path, storage, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    model = build(tmp_path, config(kind, "names_own"), config(kind, "coco_2017_train", 80))
    assert "classes: 3 of the student's 3 are among the teacher's 80: person, car, dog" in caplog.messages
    background = kind == "rcnn"
    places = (*COCO, 80) if background else COCO
    assert model.distillation.classes == {
        "classes": CommonClasses(tuple(range(3 + background)), places, (3 + background, 80 + background))
    }
    with torch.no_grad():
        class_layer(model.distillation.teacher.network).weight.mul_(30)
    seen, whole = spy(model, monkeypatch)
    loss = model(inputs())["loss_kd_kl"]
    ((student, teacher, _),) = seen
    assert torch.equal(teacher["classes"], whole[0]["classes"][:, list(places)])
    wanted = (kd_loss if background else binary_kd_loss)(student["classes"], teacher["classes"])
    assert torch.equal(loss, wanted) and loss > 0
    loss.backward()
    assert class_layer(model).weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.distillation.teacher.network.parameters())


@pytest.mark.parametrize("method", ["DKD", "NKD"])
@pytest.mark.parametrize("kind", BASES)
def test_labels_are_those_of_the_common_classes(kind, method, tmp_path, storage, monkeypatch):
    """The teacher knows no tram, which is the student's class 1; the boxes are of a person and of a tram."""
    model = build(tmp_path, config(kind, "names_new"), config(kind, "coco_2017_train", 80), method)
    with torch.no_grad():
        class_layer(model).weight.mul_(0.01)  # or a softmax of two is saturated, without a gradient
    seen, _ = spy(model, monkeypatch)
    batch = inputs()
    for x in batch:
        x["instances"].gt_classes = torch.tensor([0, 1])
    losses = model(batch)
    ((student, teacher, targets),) = seen
    channels = 2 + (kind == "rcnn")
    assert student["classes"].shape[1] == teacher["classes"].shape[1] == channels
    labels = targets.labels["classes"]
    assert set(labels.unique().tolist()) == {-1, 0, 2}  # 2: the background, or no channel for it
    positions = (labels == 0).sum() + ((labels == 2).sum() if kind == "rcnn" else 0)
    assert model.distillation.metrics()["classes/positions"] == positions
    sum(x for name, x in losses.items() if method.lower() in name).backward()
    layer = class_layer(model)
    by_class = layer.weight.grad.flatten(1).abs().sum(1).view(-1, 3 + (kind != "retinanet")).sum(0)
    assert by_class[1] == 0 and by_class[0] > 0 and by_class[2] > 0


@pytest.mark.parametrize("kind", ["retinanet", "rcnn"])
def test_the_same_names_in_the_same_order_and_in_another(kind, tmp_path, storage):
    own = config(kind, "names_own")
    assert build(tmp_path, own, config(kind, "names_same")).distillation.classes == {}
    model = build(tmp_path, own, config(kind, "names_order"))
    assert model.distillation.classes["classes"].teacher[:3] == (1, 0, 2)
    assert model(inputs())["loss_kd_kl"].isfinite()
    assert "classes" not in build(tmp_path, own, config(kind, "names_other"), "Mimic").distillation.levels


def test_names_of_other_languages_need_a_mapping(tmp_path, storage):
    pair = config("retinanet", "names_other"), config("retinanet", "coco_2017_train", 80)
    hint = "by {class_map}, as NAME=NAME; or distil"
    with refused(
        "teacher", "the classes person, bicycle, .*, toothbrush$", "some of the student's Mensch, Auto, Hund", hint
    ):
        build(tmp_path, *pair)
    pairs = "['Mensch=person', 'Auto = car']"
    model = build(tmp_path, *pair, "KD", "DISTILL.CLASS_MAP", pairs)
    assert model.distillation.classes["classes"] == CommonClasses((0, 1), (0, 2), (3, 80))
    assert model(inputs())["loss_kd_kl"] > 0
    with refused("class_map", "Hund=wolf", "a class of the teacher: person, bicycle"):
        build(tmp_path, *pair, "KD", "DISTILL.CLASS_MAP", "['Hund=wolf']")
    with refused("class_map", "Hund", "NAME=NAME"):
        build(tmp_path, *pair, "KD", "DISTILL.CLASS_MAP", "['Hund']")


def test_a_teacher_without_names_gets_them_by_the_config(tmp_path, storage):
    """Its data is not registered here."""
    pair = config("rcnn", "names_own"), config("rcnn", "unknown_here", 4)
    with refused(
        "teacher", "5 classes at classes", "the student's 4", "name the classes by {teacher_class_names}, and"
    ):
        build(tmp_path, *pair)
    names = "DISTILL.TEACHER.CLASS_NAMES"
    model = build(tmp_path, *pair, "KD", names, "['dog', 'cat', 'car', 'person']")
    assert model.distillation.classes["classes"] == CommonClasses((0, 1, 2, 3), (3, 2, 0, 4), (4, 5))
    with refused("teacher_class_names", "3 names, the background among them", "5, one for each"):
        build(tmp_path, *pair, "KD", names, "['dog', 'cat']")
    with refused("teacher_class_names", "dog", "a list of names"):
        build(tmp_path, *pair, "KD", names, "['dog', 1, 2, 3]")


@pytest.mark.parametrize("kind", ["retinanet", "rcnn"])
def test_names_of_other_data_than_the_teachers(kind, tmp_path):
    """Its base's: COCO has 80, the teacher 3."""
    model = build(tmp_path, config(kind, "names_own"), config(kind, "coco_2017_train"))
    assert "classes" in model.distillation.levels and model.distillation.classes == {}


@pytest.mark.parametrize("method", ["KD", "CWD", "DKD"])
def test_a_segmentors_map_of_logits(method, tmp_path, storage):
    pair = [segmentor("FPN", "DATASETS.TRAIN", (name,)) for name in ("names_new", "names_order")]
    model = build(tmp_path, *pair, method)
    assert model.distillation.classes["logits"] == CommonClasses((0, 2, 3, 4), (1, 2, 3, 4), (5, 5))
    losses = model(labelled())
    sum(x for name, x in losses.items() if method.lower() in name.split("_")).backward()
    gradient = model.sem_seg_head.predictor.weight.grad.flatten(1).abs().sum(1)
    assert gradient[1] == 0 and all(gradient[i] > 0 for i in (0, 2, 3, 4))


@pytest.mark.parametrize("kind", ["retinanet", "rcnn"])
@pytest.mark.parametrize(("data", "inherits"), [("names_same", True), ("names_order", False), ("unknown_here", True)])
def test_class_layers_of_other_classes_are_not_inherited(kind, data, inherits, tmp_path):
    """Their shapes agree; the other layers of the head are inherited in any case."""
    own = config(kind, "names_own")
    torch.manual_seed(5)
    model = build(tmp_path, own, config(kind, data), "", "DISTILL.INHERIT", "always")
    torch.manual_seed(5)
    plain = build_model(own)
    start, moved = (
        plain.state_dict(),
        {n for n, x in model.state_dict().items() if not torch.equal(x, plain.state_dict()[n])},
    )
    of_classes = {n for n in start if "cls_score.weight" in n or n.endswith("roi_heads.box_predictor.bbox_pred.weight")}
    assert of_classes and (of_classes <= moved) == inherits and bool(of_classes & moved) == inherits
    assert {"head.bbox_pred.weight", "roi_heads.box_head.fc1.weight"} & moved
