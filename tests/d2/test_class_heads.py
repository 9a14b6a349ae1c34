"""The class heads of Detectron2's detectors: what is read from the student, what the teacher is asked, what is refused."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone, build_model
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from torch import nn

from acam_kd.d2 import add_distillation_config

from .conftest import ROOT, detector_config, distillation_config, inputs, refused, save_config

K = 3
PLAIN = ["MODEL.RESNETS.NORM", ""]  # alike in training and evaluation


@META_ARCH_REGISTRY.register()
def TinyFCOS(cfg) -> nn.Module:
    """Detectron2 has the class, and no config that names it."""
    backbone = build_backbone(cfg)
    levels = ["p3", "p4", "p5", "p6", "p7"]
    shapes = [backbone.output_shape()[level] for level in levels]
    return FCOS(
        backbone=backbone,
        head=FCOSHead(input_shape=shapes, num_classes=K, conv_dims=[16]),
        head_in_features=levels,
        num_classes=K,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )


HEADS = {
    "retinanet": ("Base-RetinaNet.yaml", []),
    "fcos": ("Base-RetinaNet.yaml", ["MODEL.META_ARCHITECTURE", "TinyFCOS"]),
    "faster rcnn": ("Base-RCNN-FPN.yaml", []),
    "sigmoid rcnn": ("Base-RCNN-FPN.yaml", ["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True]),
    "mask rcnn": ("Base-RCNN-FPN.yaml", ["MODEL.MASK_ON", True]),
}
DENSE = ("retinanet", "fcos")
CASCADE = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True]
C4 = [
    "MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", "['res4']",
    "MODEL.RPN.IN_FEATURES", "['res4']", "MODEL.ROI_HEADS.IN_FEATURES", "['res4']", "MODEL.ROI_HEADS.NAME",
    "Res5ROIHeads", "MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]",
]  # fmt: skip


def config(kind, *opts):
    base, own = HEADS[kind]
    return detector_config(base, *PLAIN, *own, *opts)


def build(tmp_path, student, teacher=None, method="KD", *opts):
    path = save_config(teacher if teacher is not None else student, tmp_path / "teacher.yaml")
    return build_model(distillation_config(student, path, "DISTILL.METHOD", method, *opts)).train()


def spy(model):
    """Record the distiller's inputs: (student, teacher, targets) of every step."""
    seen = []
    model.distillation.method.register_forward_pre_hook(lambda module, args: seen.append(args))
    return seen


def class_weight(student):
    if isinstance(student, FCOS) or hasattr(student, "head"):
        return student.head.cls_score.weight
    return student.roi_heads.box_predictor.cls_score.weight


def distilled(losses):
    return sum(value for name, value in losses.items() if name.split("_")[1] in ("kd", "dkd", "nkd"))


@pytest.mark.parametrize("kind", HEADS)
def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(kind, tmp_path, storage):
    """So the teacher is asked about the same anchors, or regions, in the same order, and class by class."""
    model = build(tmp_path, config(kind))
    model.distillation.teacher.network.load_state_dict(model.state_dict())
    seen = spy(model)
    assert model(inputs())["loss_kd_kl"] < 1e-6
    ((student, teacher, _),) = seen
    assert student["classes"].std() > 1e-4  # and not because all is alike
    torch.testing.assert_close(student["classes"], teacher["classes"], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        class_weight(model.distillation.teacher.network).mul_(-30)
    assert model(inputs())["loss_kd_kl"] > 1e-4


@pytest.mark.parametrize("method", ["KD", "DKD", "NKD"])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("boxes", [True, False])
def test_class_head_and_backbone_learn_and_the_teacher_does_not(kind, method, boxes, tmp_path, storage):
    model = build(tmp_path, config(kind), None, method)
    with torch.no_grad():
        class_weight(model.distillation.teacher.network).mul_(-30)
    before = {name: value.clone() for name, value in model.distillation.teacher.network.state_dict().items()}
    losses = model(inputs(boxes=boxes))
    loss = distilled(losses)
    loss.backward()
    weight, backbone = class_weight(model).grad, next(model.backbone.parameters()).grad
    nothing = method != "KD" and not boxes and kind in (*DENSE, "sigmoid rcnn")  # there is no foreground
    assert (weight.abs().sum() == 0) == (backbone.abs().sum() == 0) == nothing
    assert (loss == 0) == nothing and loss.isfinite()
    assert all(p.grad is None for p in model.distillation.teacher.network.parameters())
    assert all(
        torch.equal(before[name], value) for name, value in model.distillation.teacher.network.state_dict().items()
    )


@pytest.mark.parametrize("kind", DENSE)
def test_samkd_has_the_maps_that_the_head_sees_and_all_anchors(kind, tmp_path, storage):
    model = build(tmp_path, config(kind), None, "SAMKD")
    seen = spy(model)
    losses = model(inputs())
    ((student, _, _),) = seen
    positions = sum(x.shape[2] * x.shape[3] for level, x in student.items() if level != "classes")
    assert list(student) == ["p3", "p4", "p5", "p6", "p7", "classes"]
    assert student["classes"].shape[2] == positions * (9 if kind == "retinanet" else 1)
    (losses["loss_samkd_features"] + losses["loss_samkd_logits"]).backward()
    assert class_weight(model).grad.abs().sum() > 0 and next(model.backbone.parameters()).grad.abs().sum() > 0


@pytest.mark.parametrize("kind", DENSE)
def test_anchors_have_the_labels_and_the_order_that_the_student_is_trained_with(kind, tmp_path, storage):
    model = build(tmp_path, config(kind), None, "DKD")
    seen, raw = spy(model), []
    model.head.cls_score.register_forward_hook(lambda m, a, out: raw.append(out))
    batch = inputs()
    batch[1]["instances"] = batch[1]["instances"][:1]
    model(batch)
    ((student, _, targets),) = seen
    anchors = model.anchor_generator(raw)
    labels, _ = type(model).label_anchors(model, anchors, [x["instances"] for x in batch])
    assert torch.equal(targets.labels["classes"], torch.stack(labels)[..., None])
    assert set(targets.labels["classes"].unique().tolist()) >= {0, K}
    per_position = raw[0].shape[1] // K
    assert per_position == (9 if kind == "retinanet" else 1)
    before = raw[0][0, 0].numel() * per_position
    height, width = raw[1].shape[2:]
    assert student["classes"].shape == (2, K, sum(x[0, 0].numel() for x in raw) * per_position, 1)
    y, x, anchor = height - 1, 2, per_position - 1
    place = before + (y * width + x) * per_position + anchor
    wanted = raw[1][1, anchor * K : (anchor + 1) * K, y, x]
    assert torch.equal(student["classes"][1, :, place, 0], wanted)


@pytest.mark.parametrize("kind", ["faster rcnn", "sigmoid rcnn", "mask rcnn"])
def test_regions_are_those_that_were_sampled_for_the_student(kind, tmp_path, storage, monkeypatch):
    model = build(tmp_path, config(kind), None, "DKD")
    seen, trained, asked = spy(model), [], []
    predictor = model.roi_heads.box_predictor
    losses = predictor.losses
    monkeypatch.setattr(predictor, "losses", lambda *args: trained.append(args) or losses(*args))
    model.distillation.teacher.network.roi_heads.box_pooler.register_forward_pre_hook(
        lambda m, args: asked.append(args[1])
    )
    model(inputs())
    (((scores, _), proposals),) = trained
    ((student, teacher, targets),) = seen
    labels = torch.cat([p.gt_classes for p in proposals])
    assert torch.equal(targets.labels["classes"][:, 0, 0], labels) and len(labels.unique()) > 1
    channels = K if kind == "sigmoid rcnn" else K + 1
    assert student["classes"].shape == teacher["classes"].shape == (len(labels), channels, 1, 1)
    assert torch.equal(student["classes"][..., 0, 0], scores[:, :channels])
    assert all(torch.equal(a.tensor, p.proposal_boxes.tensor) for a, p in zip(asked[0], proposals))
    if kind == "sigmoid rcnn":  # the background has no channel there, and is no position to compare
        assert model.distillation.method.metrics()["classes/positions"] == (labels < K).sum()
    else:
        assert model.distillation.method.metrics()["classes/positions"] == len(labels)


def test_of_a_cascade_the_first_stage_teaches(tmp_path, storage):
    model = build(tmp_path, config("faster rcnn"), config("faster rcnn", *CASCADE))
    seen, asked = spy(model), []
    heads = model.distillation.teacher.network.roi_heads
    heads.box_pooler.register_forward_hook(lambda m, args, out: asked.append(out))
    model(inputs())
    with torch.no_grad():
        first, second = (heads.box_predictor[i](heads.box_head[i](asked[0]))[0] for i in (0, 1))
    assert torch.equal(seen[0][1]["classes"][..., 0, 0], first) and not torch.equal(first, second)
    assert seen[0][0]["classes"].shape[0] == len(first)


def test_a_cascade_is_no_student_and_heads_of_no_known_kind_are_neither(tmp_path):
    other = "distil the backbone's features instead, by another {method}"
    with refused("student", "the class head of a GeneralizedRCNN with CascadeROIHeads", "first stage", other):
        build(tmp_path, config("faster rcnn", *CASCADE), config("faster rcnn"))
    with refused("student", "a GeneralizedRCNN with Res5ROIHeads", "", other):
        build(tmp_path, config("faster rcnn", *C4))
    rpn = config("faster rcnn", "MODEL.META_ARCHITECTURE", "ProposalNetwork")
    with refused("student", "the class head of a ProposalNetwork"):
        build(tmp_path, rpn, config("faster rcnn"))
    with refused("teacher", "the class head of a ProposalNetwork"):
        build(tmp_path, config("faster rcnn"), rpn)


def test_the_anchors_of_the_zoo_are_ours():
    """Not on the meta device, where numbers are not compared: or KD refuses the flagship's teacher."""
    cfg, teacher = get_cfg(), model_zoo.get_config("COCO-Detection/retinanet_R_101_FPN_3x.yaml")
    add_distillation_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs/acam_retinanet_r50_r101.yaml"))
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == teacher.MODEL.ANCHOR_GENERATOR.SIZES


def test_anchors_may_be_rounded(tmp_path):
    sizes = [[x, round(x * 2 ** (1 / 3), 2)] for x in (32, 64, 128, 256, 512)]
    exact = [[x, x * 2 ** (1 / 3)] for x in (32, 64, 128, 256, 512)]
    both = (config("retinanet", "MODEL.ANCHOR_GENERATOR.SIZES", str(x)) for x in (sizes, exact))
    assert build(tmp_path, *both).distillation.levels == {"classes": "classes"}


@pytest.mark.parametrize(
    ("student", "teacher", "found", "expected"),
    [
        (["retinanet"], ["faster rcnn"], "one softmax .4. beside the student's a sigmoid for each class", "one kind"),
        (["sigmoid rcnn"], ["faster rcnn"], "one softmax .4. beside the student's a sigmoid for each", "one kind"),
        (["retinanet"], ["sigmoid rcnn"], "a GeneralizedRCNN, which predicts regions", "a RetinaNet's"),
        (["sigmoid rcnn"], ["fcos"], "a FCOS, which predicts anchors", "a GeneralizedRCNN's"),
        (["retinanet"], ["fcos"], "a FCOS with other anchors", "a RetinaNet's"),
        (
            ["retinanet"],
            ["retinanet", "MODEL.ANCHOR_GENERATOR.SIZES", "[[30, 40, 50], [60], [100], [200], [400]]"],
            "other anchors",
            "like the student's",
        ),
        (["retinanet"], ["retinanet", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[1.0]]"], "other anchors", ""),
        (
            ["retinanet"],
            ["retinanet", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[0.6, 1.0, 2.0]]"],
            "other anchors",
            "",
        ),
        (
            ["faster rcnn"],
            ["faster rcnn", "MODEL.ROI_HEADS.NUM_CLASSES", 5],
            "6 classes at classes",
            "the student's 4",
        ),
    ],
)
def test_heads_that_do_not_correspond_are_refused(student, teacher, found, expected, tmp_path):
    if teacher[1:2] == ["MODEL.ANCHOR_GENERATOR.SIZES"]:
        teacher = [*teacher[:2], str([[x, x + 1, x + 2] for x in (30, 60, 100, 200, 400)])]
    with refused("teacher", found, expected, "{method}"):
        build(tmp_path, config(*student), config(*teacher))


def taps(model):
    return model.distillation._reader.class_head.taps


@pytest.mark.parametrize("kind", ["retinanet", "faster rcnn"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_reads_its_own_head_and_the_state_is_the_plain_students(kind, duplicate, tmp_path, storage):
    model = build(tmp_path, config(kind))
    twin = duplicate(model)
    assert list(twin.state_dict()) == list(build_model(config(kind)).state_dict())
    sum(twin(inputs()).values()).backward()
    assert class_weight(model).grad is None and class_weight(twin).grad is not None
    assert taps(model) and all(not tap._times for tap in (*taps(model), *taps(twin)))
    sum(model(inputs()).values()).backward()
    assert class_weight(model).grad is not None


@pytest.mark.parametrize("kind", ["retinanet", "faster rcnn"])
def test_nothing_of_a_step_is_kept(kind, tmp_path, storage):
    model, kept = build(tmp_path, config(kind)), []
    module = model.head.cls_score if kind == "retinanet" else model.roi_heads.box_predictor.cls_score
    module.register_forward_hook(lambda m, a, out: kept.append(weakref.ref(out)))
    with torch.no_grad():  # nothing is distilled
        model(inputs())
    assert kept and all(ref() is None for ref in kept)
    sum(model(inputs()).values()).backward()
    gc.collect()
    assert all(ref() is None for ref in kept) and all(tap._last is None for tap in taps(model))
    model.eval()(inputs())
    assert all(not tap._times for tap in taps(model))


@pytest.mark.parametrize("kind", HEADS)
def test_a_step_that_fails_does_not_spoil_the_next(kind, tmp_path, storage):
    model = build(tmp_path, config(kind), None, "KD+DKD")

    def step(batch):
        torch.manual_seed(3)  # regions are drawn
        return {name: value.item() for name, value in model(batch).items() if "kd" in name}

    before = step(inputs())
    ran = []
    taps(model)[0].record = lambda *call: ran.append(call)
    wrong = inputs()
    wrong[0]["instances"].gt_classes[:] = 99
    with pytest.raises((RuntimeError, IndexError)):
        step(wrong)
    del taps(model)[0].record
    assert ran or kind not in DENSE  # it had come that far
    assert not any(tap._times or tap.armed for tap in taps(model))
    assert step(inputs()) == before and set(before) == {"loss_kd_kl", "loss_dkd_target", "loss_dkd_nontarget"}


@pytest.mark.parametrize("kind", ["retinanet", "faster rcnn"])
def test_features_and_classes_together(kind, tmp_path, storage):
    model = build(tmp_path, config(kind), None, "PKD+KD", "DISTILL.PKD.ALPHA", 3.0, "DISTILL.LOG_PERIOD", 1)
    pkd, kd = model.distillation.method.parts()
    assert pkd.alpha == 3 and "classes" not in pkd.levels and kd.levels == ["classes"]
    losses = model(inputs())
    assert {"loss_pkd_pearson", "loss_kd_kl"} == {name for name in losses if name.split("_")[1] in ("pkd", "kd")}
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert "distill/KD/classes/agreement" in storage.latest() and "distill/PKD/p4/pearson" in storage.latest()
    chosen = build(tmp_path, config(kind), None, "PKD+KD", "DISTILL.LEVELS", "['p4']")
    assert chosen.distillation.levels == {"p4": "p4", "classes": "classes"}
    with refused("taps", "backbone", "logits or classes with KD", "or choose another {method}"):
        build(tmp_path, config(kind), None, "PKD+KD", "DISTILL.TAPS", "['backbone']")
    with refused("PKD.taps", "classes", "backbone with PKD"):
        build(tmp_path, config(kind), None, "PKD+KD", "DISTILL.PKD.TAPS", "['backbone', 'classes']")


@pytest.mark.parametrize("kind", ["retinanet", "faster rcnn"])
@pytest.mark.parametrize("methods", ["AT+CWD", "PKD+KD", "MGD+KD"])
def test_each_of_several_methods_has_its_own_levels(methods, kind, tmp_path, storage):
    first, second = methods.split("+")
    own = [f"DISTILL.{first.upper()}.LEVELS", "['p4']"]
    if second != "KD":
        own += [f"DISTILL.{second}.LEVELS", "['p5', 'p6']"]
    model = build(tmp_path, config(kind), None, methods, *own)
    with torch.no_grad():  # it begins as its teacher
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    one, two = model.distillation.method.parts()
    assert one.levels == ["p4"] and two.levels == (["classes"] if second == "KD" else ["p5", "p6"])
    losses = {name: loss for name, loss in model(inputs()).items() if name.split("_")[1] in methods.lower().split("+")}
    assert {name.split("_")[1] for name in losses} == set(methods.lower().split("+"))
    values = {name: loss.item() for name, loss in losses.items()}
    assert all(0 < value < math.inf for value in values.values()), values
