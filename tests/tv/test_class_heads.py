"""The class heads of torchvision's detectors, the targets of its batches, and methods side by side."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref

import pytest
import torch
from torch import nn
from torchvision.models.detection import roi_heads

from acam_kd.core import Plan
from acam_kd.tv.distillation import build_distillation
from acam_kd.tv.models import build_model, plain

from .conftest import STUDENT, refuses, snapshot
from .test_cli import quick, run
from .test_cli import refused as refused

K = 4  # with the background
HEADS = {
    "fcos": "fcos_mobilenet_v3_small_fpn64",
    "retinanet": "retinanet_mobilenet_v3_small_fpn32",
    "faster rcnn": "fasterrcnn_mobilenet_v3_small_fpn32",
}
DENSE = ("fcos", "retinanet")
IMAGES = [torch.rand(3, 64, 96), torch.rand(3, 96, 64)]
TARGETS = [
    {"boxes": torch.tensor([[5.0, 5, 50, 50], [20, 10, 60, 40]]), "labels": torch.tensor([1, 3])},
    {"boxes": torch.tensor([[5.0, 50, 40, 90]]), "labels": torch.tensor([2])},
]
EMPTY = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 2


def model(name, classes=K, size=64):
    return build_model(name, num_classes=classes, size=size)


def build(kind, method="KD", teacher=None, size=64, **arguments):
    methods = {name: {} for name in method.split("+")}
    student = model(HEADS[kind], size=size)
    build_distillation(
        student, teacher or model(HEADS[kind]), Plan(methods=methods, **{"inherit": "auto", **arguments})
    )
    return student.train()


def teacher_of(built):
    """Return the teacher's whole detector."""
    return built.distillation.teacher.network


def class_weight(detector):
    if hasattr(detector, "roi_heads"):
        return detector.roi_heads.box_predictor.cls_score.weight
    return detector.head.classification_head.cls_logits.weight


def spy(built):
    """Record the method's inputs: (student, teacher, targets) of every step."""
    seen = []
    built.distillation.method.register_forward_pre_hook(lambda module, args: seen.append(args))
    return seen


def taps(built):
    return built.distillation._reader._taps()


def differ(built):
    """Predictions that are not all alike, as those of untrained heads are."""
    with torch.no_grad():
        class_weight(teacher_of(built)).mul_(-30)


def calm(detector):
    """Batch normalisation as in evaluation."""
    for module in detector.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


@pytest.mark.parametrize("kind", HEADS)
def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(kind):
    """So the teacher is asked about the same anchors, or regions, in the same order, and class by class."""
    built = build(kind)
    with torch.no_grad():
        class_weight(built).mul_(10)
        for module in getattr(built, "head", nn.Identity()).modules():
            if isinstance(module, nn.Conv2d):  # from its start of 0.01 nothing comes through
                nn.init.kaiming_normal_(module.weight)
    teacher_of(built).load_state_dict(built.state_dict())
    calm(built)
    seen = spy(built)
    assert built(IMAGES, TARGETS)["loss_kd_kl"] < 1e-6
    ((student, teacher, _),) = seen
    assert student["classes"].std() > 1e-4
    torch.testing.assert_close(student["classes"], teacher["classes"], rtol=1e-4, atol=1e-5)
    differ(built)
    assert built(IMAGES, TARGETS)["loss_kd_kl"] > 1e-6


@pytest.mark.parametrize("method", ["KD", "DKD", "NKD"])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("targets", [TARGETS, EMPTY], ids=["boxes", "none"])
def test_class_head_and_backbone_learn_and_the_teacher_does_not(kind, method, targets):
    built = build(kind, method)
    differ(built)
    before = {name: value.clone() for name, value in teacher_of(built).state_dict().items()}
    loss = sum(value for name, value in built(IMAGES, targets).items() if method.lower() in name.split("_"))
    loss.backward()
    reached = [p.grad for p in built.backbone.parameters() if p.grad is not None]
    nothing = method != "KD" and targets is EMPTY and kind in DENSE  # there is no foreground
    assert (class_weight(built).grad.abs().sum() == 0) == nothing
    assert all(grad.abs().sum() == 0 for grad in reached) == nothing and reached
    assert (loss == 0) == nothing and loss.isfinite()
    assert all(p.grad is None for p in teacher_of(built).parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher_of(built).state_dict().items())


@pytest.mark.parametrize("kind", DENSE)
def test_samkd_has_the_maps_that_the_head_sees_and_all_anchors(kind):
    built = build(kind, "SAMKD")
    seen = spy(built)
    losses = built(IMAGES, TARGETS)
    ((student, _, _),) = seen
    positions = sum(x.shape[2] * x.shape[3] for level, x in student.items() if level != "classes")
    per_position = built.anchor_generator.num_anchors_per_location()[0]
    assert list(student) == ["0", "1", "2", "p6", "p7", "classes"]
    assert student["classes"].shape[2] == positions * per_position
    (losses["loss_samkd_features"] + losses["loss_samkd_logits"]).backward()
    assert class_weight(built).grad.abs().sum() > 0
    assert all(p.grad is not None for p in built.distillation.method.parameters())


def test_samkd_is_for_dense_heads():
    with refuses("method", "SAMKD", "meaning for a FasterRCNN", "SAMKD is for retinanet, fcos, reppoints"):
        build("faster rcnn", "SAMKD")
    with refuses("levels", "positions and", "as many anchors at every position"):
        build("retinanet", "SAMKD", levels=["0", "2"])(IMAGES, TARGETS)


@pytest.mark.parametrize("kind", DENSE)
def test_anchors_have_the_labels_that_the_student_is_trained_with(kind, monkeypatch):
    """By the one-hot targets of its focal loss, which has the anchors between left out."""
    import torchvision.models.detection as detection

    module = getattr(detection, kind)
    built, trained, raw = build(kind, "DKD"), [], []
    loss = module.sigmoid_focal_loss
    monkeypatch.setattr(module, "sigmoid_focal_loss", lambda x, y, **how: trained.append((x, y)) or loss(x, y, **how))
    built.head.classification_head.cls_logits.register_forward_hook(lambda m, a, out: raw.append(out))
    seen = spy(built)
    built(IMAGES, TARGETS)
    ((student, _, targets),) = seen
    labels = targets.labels["classes"][..., 0]
    one_hot = torch.cat([y.reshape(-1, K) for _, y in trained])
    wanted = torch.where(one_hot.sum(1) > 0, one_hot.argmax(1), K)
    assert torch.equal(labels[labels >= 0], wanted) and {1, K} <= set(labels.unique().tolist())
    assert torch.equal(labels >= 0, labels != -1)
    logits = student["classes"][..., 0].transpose(1, 2)
    assert torch.equal(logits[labels >= 0], torch.cat([x.reshape(-1, K) for x, _ in trained]))
    per_position = raw[0].shape[1] // K
    y, x, anchor = raw[1].shape[2] - 1, 1, per_position - 1
    place = (raw[0][0, 0].numel() + y * raw[1].shape[3] + x) * per_position + anchor
    assert torch.equal(student["classes"][1, :, place, 0], raw[1][1, anchor * K : (anchor + 1) * K, y, x])


def test_an_anchor_between_foreground_and_background_is_ignored():
    """RetinaNet's overlap of 0.4 to 0.5."""
    built = build("retinanet", "DKD")
    seen, anchors = spy(built), []
    built.anchor_generator.register_forward_hook(lambda m, a, out: anchors.append(out))
    boxes = torch.tensor([[10.0, 10, 42, 42]])
    built(IMAGES[:1], [{"boxes": boxes, "labels": torch.tensor([3])}])
    from torchvision.ops import box_iou

    overlap = box_iou(boxes, anchors[0][0])[0]
    labels = seen[0][2].labels["classes"][0, :, 0]
    between = (overlap >= 0.4) & (overlap < 0.5) & (labels != 3)  # the best of all counts in any case
    assert between.sum() > 0 and torch.equal(labels == -1, between)
    assert (labels[overlap < 0.4] == K).logical_or(labels[overlap < 0.4] == 3).all()
    assert (labels[overlap >= 0.5] == 3).all()


def test_regions_are_those_that_were_sampled_for_the_student(monkeypatch):
    built, trained, asked = build("faster rcnn", "DKD"), [], []
    loss = roi_heads.fastrcnn_loss
    monkeypatch.setattr(roi_heads, "fastrcnn_loss", lambda *args: trained.append(args) or loss(*args))
    for detector in (built, teacher_of(built)):
        detector.roi_heads.box_roi_pool.register_forward_pre_hook(lambda m, args: asked.append(args[1:]))
    seen = spy(built)
    built(IMAGES, TARGETS)
    ((student, teacher, targets),) = seen
    scores, _, labels, _ = trained[0]
    assert torch.equal(targets.labels["classes"][:, 0, 0], torch.cat(labels)) and len(torch.cat(labels).unique()) > 1
    assert torch.equal(student["classes"][..., 0, 0], scores) and teacher["classes"].shape == (*scores.shape, 1, 1)
    assert all(torch.equal(a, b) for a, b in zip(asked[0][0], asked[1][0])) and asked[0][1] == asked[1][1]
    assert built.distillation.metrics()["classes/positions"] == len(scores)


@pytest.mark.parametrize("kind", ["fcos", "faster rcnn"])
def test_boxes_are_in_pixels_of_the_resized_batch(kind):
    built = build(kind, "FGD", teacher=model(HEADS[kind]), size=32)
    seen, batches = spy(built), []
    built.backbone.register_forward_hook(lambda m, args, out: batches.append(args[0]))
    targets = copy.deepcopy(TARGETS)
    losses = built(IMAGES, targets)
    ((_, _, known),) = seen
    assert known.image_sizes.tolist() == [[32, 48], [48, 32]]  # of 64 x 96 and 96 x 64
    assert batches[0].shape[2] >= 48 and batches[0].shape[3] >= 48
    torch.testing.assert_close(known.boxes, torch.cat([t["boxes"] for t in TARGETS]) / 2)
    assert known.box_images.tolist() == [0, 0, 1] and losses["loss_fgd_foreground"] > 0
    assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(targets, TARGETS))  # the caller's are left alone
    losses = built(IMAGES, EMPTY)
    assert seen[1][2].boxes.shape == (0, 4) and losses["loss_fgd_foreground"] == 0


@pytest.mark.parametrize("kind", ["fcos", "faster rcnn"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda built: pickle.loads(pickle.dumps(built))])
def test_a_copy_reads_its_own_head_and_the_state_is_a_plain_students(kind, duplicate):
    built = build(kind, "DKD+FGD")
    twin = duplicate(built)
    assert list(twin.state_dict()) == list(model(HEADS[kind]).state_dict())
    sum(twin(IMAGES, TARGETS).values()).backward()
    assert class_weight(built).grad is None and class_weight(twin).grad is not None
    assert taps(built) and all(not tap._times for tap in (*taps(built), *taps(twin)))
    resized = [x.distillation._reader.others[0] for x in (built, twin)]
    assert resized[0] is not resized[1] and not any(tap.times for tap in resized)
    assert twin.distillation.teacher.network is teacher_of(built) or duplicate is not copy.deepcopy
    sum(built(IMAGES, TARGETS).values()).backward()
    assert class_weight(built).grad is not None


@pytest.mark.parametrize("kind", ["fcos", "faster rcnn"])
def test_a_step_that_fails_does_not_spoil_the_next_and_nothing_is_kept(kind):
    built, kept = build(kind, "KD+DKD"), []
    calm(built)
    head = built.head.classification_head if kind == "fcos" else built.roi_heads.box_predictor
    head.register_forward_hook(
        lambda m, a, out: kept.append(weakref.ref(out if isinstance(out, torch.Tensor) else out[0]))
    )

    def step(targets):
        torch.manual_seed(3)  # regions are drawn
        return {name: value.item() for name, value in built(IMAGES, targets).items() if "kd" in name}

    before = step(TARGETS)
    with pytest.raises((RuntimeError, IndexError)):
        step([{**t, "labels": t["labels"] + 90} for t in TARGETS])
    assert len(kept) == 2 and not any(tap._times or tap._last for tap in taps(built))  # it had come that far
    assert step(TARGETS) == before and set(before) == {"loss_kd_kl", "loss_dkd_target", "loss_dkd_nontarget"}
    gc.collect()
    assert all(ref() is None for ref in kept)


SSD, LRASPP = "ssdlite320_mobilenet_v3_large", "lraspp_mobilenet_v3_large"


HEAD = "that of RetinaNet, FCOS, Faster or Mask R-CNN"


@pytest.mark.parametrize(
    ("student", "teacher", "method", "error"),
    [
        (SSD, SSD, "KD", ("student", "the class head of SSD", HEAD, "by another {method} or {taps}")),
        ("fcos", SSD, "KD", ("teacher", "the class head of SSD", HEAD)),
        (
            "fcos",
            "faster rcnn",
            "KD",
            ("teacher", "one softmax (4) beside the student's a sigmoid for each class (4)", "one kind", "{taps}"),
        ),
        ("fcos", "retinanet", "KD", ("teacher", "a RetinaNet with other anchors", "student's, a FCOS's", "{method}")),
        ("fcos", ("fcos", 7), "KD", ("teacher", "7 classes at classes", "the student's 4", "{taps}")),
        ("fcos", "fcos", "PKD+KD", ("taps", "backbone", "logits or classes with KD")),
        (LRASPP, LRASPP, "KD+FGD", ("method", "FGD", "one that needs no boxes", "a LRASPP is trained without any")),
        (LRASPP, LRASPP, "X", ("method", "X", "one of ACAMKD")),
    ],
)
def test_heads_that_do_not_correspond_are_refused(student, teacher, method, error):
    names = [x if isinstance(x, tuple) else (x, K) for x in (student, teacher)]
    student, teacher = (model(HEADS.get(name, name), classes) for name, classes in names)
    before = snapshot(student)
    plan = Plan(methods={n: {} for n in method.split("+")}, taps=["backbone"] if method == "PKD+KD" else [])
    with refuses(*error):
        build_distillation(student, teacher, plan)
    assert snapshot(student) == before


@pytest.mark.parametrize("method", ["DKD", "NKD"])
def test_pixels_without_a_label_are_not_compared(method):
    built = model(LRASPP)
    build_distillation(built, model(LRASPP), Plan(methods={method: {}}))
    built.train()
    seen = spy(built)
    semantic = [torch.randint(0, K, image.shape[1:]) for image in IMAGES]
    semantic[0][:32] = 255
    losses = built(IMAGES, [{"semantic": x} for x in semantic])
    ((student, _, known),) = seen
    assert student["logits"].shape == (2, K, 12, 12)  # of 96 x 96, padded
    full = torch.full((2, 96, 96), -1)
    full[0, 32:64], full[1, :, :64] = semantic[0][32:], semantic[1]
    assert torch.equal(known.labels["logits"], full[:, 4::8, 4::8])
    assert known.image_sizes.tolist() == [[64, 96], [96, 64]]
    assert built.distillation.metrics()["logits/positions"] == 4 * 12 + 12 * 8
    loss = sum(value for name, value in losses.items() if method.lower() in name)
    loss.backward()
    assert loss > 0 and all(p.grad is not None for p in plain(built).classifier.parameters())
    nothing = built(IMAGES, [{"semantic": torch.full_like(x, 255)} for x in semantic])
    assert all(value == 0 for name, value in nothing.items() if method.lower() in name)


def test_two_methods_on_the_command_line(data, finished, tmp_path):
    out = tmp_path / "run"
    run(*quick(data, out, "--teacher", finished, "--method", "PKD+KD", "--set", "PKD.alpha=3", "KD.temperature=2"))
    settings = json.loads((out / "settings.json").read_text())
    assert settings["method"] == "PKD+KD" and settings["options"] == ["PKD.alpha=3", "KD.temperature=2"]
    assert list(torch.load(out / "student.pth")) == list(build_model(STUDENT, num_classes=7, size=64).state_dict())


def test_methods_that_cannot_be_are_refused_in_the_words_of_the_command(data, finished, tmp_path, refused, capsys):
    def message(*arguments):
        found = refused(*quick(data, tmp_path / "out", "--teacher", finished, *arguments))
        assert "DISTILL" not in found and "key" not in found and "{" not in found.replace("{'", "")
        return found

    def usage(method):
        with pytest.raises(SystemExit):
            run(*quick(data, tmp_path / "out", "--teacher", finished, "--method", method))
        return capsys.readouterr().err.splitlines()[-1]

    assert "argument --method: found Nothing, expected one of ACAMKD, " in usage("PKD+Nothing")
    assert "found KD+KD, expected each method once" in usage("KD+KD")
    assert message("--method", "PKD+KD", "--set", "alpha=3").startswith(
        "acam-kd: --set: found alpha=3, expected NAME=VALUE with PKD.alpha="
    )
    assert message("--method", "PKD+KD", "--set", "PKD.alpha=-1") == (
        "acam-kd: --set PKD.alpha: found -1.0, expected >= 0 and finite"
    )
    (tmp_path / "no.pth").write_text("no tokens")
    assert message("--method", "MasKD", "--set", f"tokens={tmp_path / 'no.pth'}").startswith(
        f"acam-kd: --set MasKD.tokens: found {tmp_path}/no.pth, which holds no learnt tokens"
    )


@pytest.mark.parametrize("kind", ["fcos", "faster rcnn"])
@pytest.mark.parametrize("method", ["AT+CWD", "PKD+KD", "MGD+KD"])
def test_each_of_several_methods_has_its_own_levels(method, kind):
    first, second = method.split("+")
    methods = {first: {"levels": ["1"]}, second: {} if second == "KD" else {"levels": ["0", "2"]}}
    built = model(HEADS[kind])
    if kind != "fcos" and second == "CWD":
        methods[second]["levels"] = ["0"]
    build_distillation(built, model(HEADS[kind]), Plan(methods=methods))
    one, two = built.distillation.method.parts()
    assert one.levels == ["1"] and two.levels == (["classes"] if second == "KD" else methods[second]["levels"])
    losses = built.train()(IMAGES, TARGETS)
    of_methods = {name: x for name, x in losses.items() if {*name.split("_")} & {*method.lower().split("+")}}
    assert {name.split("_")[1] for name in of_methods} == set(method.lower().split("+"))
    assert all(loss.isfinite() and loss > 0 for loss in of_methods.values())


def test_a_recipe_is_the_same_in_both_engines():
    """The first four levels of FCOS for PKD, the authors' weights of FGD for FCOS and for R-CNNs."""
    assert build("fcos", "PKD").distillation.method.levels == ["0", "1", "2", "p6"]
    assert build("fcos", "FGD").distillation.method.weights["foreground"] == 1.6e-3
    assert build("faster rcnn", "FGD").distillation.method.weights["foreground"] == 5e-5
    segmentor = model(LRASPP)
    build_distillation(segmentor, model(LRASPP), Plan(methods={"MGD": {}}))
    assert segmentor.distillation.method.levels == ["high"] and segmentor.distillation.method.lambda_mask == 0.75
