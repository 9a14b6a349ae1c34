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

from acam_kd.tv.distillation import build_distillation
from acam_kd.tv.models import build_model, plain

from .conftest import STUDENT
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
    return build_distillation(student, teacher or model(HEADS[kind]), methods=methods, **arguments).train()


def class_weight(detector):
    if hasattr(detector, "roi_heads"):
        return detector.roi_heads.box_predictor.cls_score.weight
    return detector.head.classification_head.cls_logits.weight


def spy(built):
    """What the distiller is given: (student, teacher, targets) of every step."""
    seen = []
    built.distiller.register_forward_pre_hook(lambda module, args: seen.append(args))
    return seen


def taps(built):
    return [tap for tap in vars(built._class_head).values() if hasattr(tap, "_times")]


def differ(built):
    """Predictions that are not all alike, as those of untrained heads are."""
    with torch.no_grad():
        class_weight(built.teacher.network).mul_(-30)


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
        class_weight(built.student).mul_(10)
        for module in getattr(built.student, "head", nn.Identity()).modules():
            if isinstance(module, nn.Conv2d):  # from its start of 0.01 nothing comes through
                nn.init.kaiming_normal_(module.weight)
    built.teacher.network.load_state_dict(built.student.state_dict())
    calm(built.student)
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
    before = {name: value.clone() for name, value in built.teacher.network.state_dict().items()}
    loss = sum(value for name, value in built(IMAGES, targets).items() if method.lower() in name.split("_"))
    loss.backward()
    reached = [p.grad for p in built.student.backbone.parameters() if p.grad is not None]
    nothing = method != "KD" and targets is EMPTY and kind in DENSE  # there is no foreground
    assert (class_weight(built.student).grad.abs().sum() == 0) == nothing
    assert all(grad.abs().sum() == 0 for grad in reached) == nothing and reached
    assert (loss == 0) == nothing and loss.isfinite()
    assert all(p.grad is None for p in built.teacher.network.parameters())
    assert all(torch.equal(before[name], value) for name, value in built.teacher.network.state_dict().items())


@pytest.mark.parametrize("kind", DENSE)
def test_anchors_have_the_labels_that_the_student_is_trained_with(kind, monkeypatch):
    """By the one-hot targets of its focal loss, which has the anchors between left out."""
    import torchvision.models.detection as detection

    module = getattr(detection, kind)
    built, trained, raw = build(kind, "DKD"), [], []
    loss = module.sigmoid_focal_loss
    monkeypatch.setattr(module, "sigmoid_focal_loss", lambda x, y, **how: trained.append((x, y)) or loss(x, y, **how))
    built.student.head.classification_head.cls_logits.register_forward_hook(lambda m, a, out: raw.append(out))
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
    built.student.anchor_generator.register_forward_hook(lambda m, a, out: anchors.append(out))
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
    for detector in (built.student, built.teacher.network):
        detector.roi_heads.box_roi_pool.register_forward_pre_hook(lambda m, args: asked.append(args[1:]))
    seen = spy(built)
    built(IMAGES, TARGETS)
    ((student, teacher, targets),) = seen
    scores, _, labels, _ = trained[0]
    assert torch.equal(targets.labels["classes"][:, 0, 0], torch.cat(labels)) and len(torch.cat(labels).unique()) > 1
    assert torch.equal(student["classes"][..., 0, 0], scores) and teacher["classes"].shape == (*scores.shape, 1, 1)
    assert all(torch.equal(a, b) for a, b in zip(asked[0][0], asked[1][0])) and asked[0][1] == asked[1][1]
    assert built.distiller.metrics()["classes/positions"] == len(scores)


@pytest.mark.parametrize("kind", ["fcos", "faster rcnn"])
def test_boxes_are_in_pixels_of_the_resized_batch(kind):
    built = build(kind, "FGD", teacher=model(HEADS[kind]), size=32)
    seen, batches = spy(built), []
    built.student.backbone.register_forward_hook(lambda m, args, out: batches.append(args[0]))
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
    assert list(twin.student.state_dict()) == list(model(HEADS[kind]).state_dict())
    sum(twin(IMAGES, TARGETS).values()).backward()
    assert class_weight(built.student).grad is None and class_weight(twin.student).grad is not None
    assert taps(built) and all(not tap._times for tap in (*taps(built), *taps(twin)))
    assert not built._read_targets._resized._times and not twin._read_targets._resized._times
    sum(built(IMAGES, TARGETS).values()).backward()
    assert class_weight(built.student).grad is not None


@pytest.mark.parametrize("kind", ["fcos", "faster rcnn"])
def test_a_step_that_fails_does_not_spoil_the_next_and_nothing_is_kept(kind):
    built, kept = build(kind, "KD+DKD"), []
    calm(built.student)
    head = built.student.head.classification_head if kind == "fcos" else built.student.roi_heads.box_predictor
    head.register_forward_hook(
        lambda m, a, out: kept.append(weakref.ref(out if isinstance(out, torch.Tensor) else out[0]))
    )

    def step(targets):
        torch.manual_seed(3)  # regions are drawn
        return {name: value.item() for name, value in built(IMAGES, targets).items() if "kd" in name}

    before = step(TARGETS)
    with pytest.raises((RuntimeError, IndexError)):
        step([{**t, "labels": t["labels"] + 90} for t in TARGETS])
    assert kept[-1]() is not None and any(tap._times for tap in taps(built))  # it had come that far
    assert step(TARGETS) == before and set(before) == {"loss_kd_kl", "loss_dkd_target", "loss_dkd_nontarget"}
    gc.collect()
    assert all(ref() is None for ref in kept)


SSD, LRASPP = "ssdlite320_mobilenet_v3_large", "lraspp_mobilenet_v3_large"


@pytest.mark.parametrize(
    ("student", "teacher", "method", "message"),
    [
        (SSD, SSD, "KD", r"the class head of SSD cannot be distilled; .* \(options: --method, --taps\)"),
        ("fcos", SSD, "KD", "the class head of SSD cannot be distilled"),
        ("fcos", "faster rcnn", "KD", "one class head predicts each class on its own, .*options: --taps, --method"),
        ("fcos", "retinanet", "KD", r"student, FCOS, and the teacher, RetinaNet, have different anchors.*--method"),
        ("fcos", ("fcos", 7), "KD", r"predicts 4 classes, the teacher 7, .*\(option: --taps\)"),
        (
            "fcos",
            "fcos",
            "PKD+KD",
            r"KD distils logits or classes, and what is tapped is 0 .*\(options: --taps, --meth",
        ),
        (LRASPP, LRASPP, "KD+FGD", r"FGD needs boxes, and a LRASPP is trained without any \(option: --method\)"),
        (LRASPP, LRASPP, "X", "no distiller is called 'X'; known: ACAMKD"),
    ],
)
def test_heads_that_do_not_correspond_are_refused(student, teacher, method, message):
    names = [x if isinstance(x, tuple) else (x, K) for x in (student, teacher)]
    student, teacher = (model(HEADS.get(name, name), classes) for name, classes in names)
    taps = ["backbone"] if method == "PKD+KD" else []
    with pytest.raises((ValueError, KeyError), match=message) as error:
        build_distillation(student, teacher, methods={name: {} for name in method.split("+")}, taps=taps)
    message = str(error.value.args[0])
    assert "\n" not in message and "DISTILL" not in message and "key" not in message


@pytest.mark.parametrize("method", ["DKD", "NKD"])
def test_pixels_without_a_label_are_not_compared(method):
    built = build_distillation(model(LRASPP), model(LRASPP), methods={method: {}}).train()
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
    assert built.distiller.metrics()["logits/positions"] == 4 * 12 + 12 * 8
    loss = sum(value for name, value in losses.items() if method.lower() in name)
    loss.backward()
    assert loss > 0 and all(p.grad is not None for p in plain(built.student).classifier.parameters())
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
        assert "DISTILL" not in found and "key" not in found
        return found

    def usage(method):
        with pytest.raises(SystemExit):
            run(*quick(data, tmp_path / "out", "--teacher", finished, "--method", method))
        return capsys.readouterr().err.splitlines()[-1]

    assert "argument --method: no distiller is called 'Nothing'; known: ACAMKD, " in usage("PKD+Nothing")
    assert "a method comes twice in 'KD+KD' (option: --method)" in usage("KD+KD")
    assert "--set alpha=3: known are PKD.alpha=" in message("--method", "PKD+KD", "--set", "alpha=3")
    assert "alpha must be finite and not negative, found -1.0 (option: --set PKD.alpha)" in message(
        "--method", "PKD+KD", "--set", "PKD.alpha=-1"
    )
    gone = tmp_path / "gone.pth"
    assert f"there are no tokens: tried {gone} (option: --set MASKD.tokens)" in message(
        "--method", "MasKD", "--set", f"tokens={gone}"
    )
    (tmp_path / "no.pth").write_text("no tokens")
    assert "no.pth is no file of learnt tokens (option: --set MASKD.tokens)" in message(
        "--method", "MasKD", "--set", f"tokens={tmp_path / 'no.pth'}"
    )
