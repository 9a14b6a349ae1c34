"""Student, teacher and method put together; weights that fit, or do not."""

from __future__ import annotations

import pytest
import torch

from acam_kd.core import Plan
from acam_kd.core.renamed import _warn_once
from acam_kd.tv.distillation import build_distillation, load_weights, parse_options
from acam_kd.tv.models import build_model, plain

from .conftest import refuses

STUDENT = "fcos_mobilenet_v3_small_fpn64"
IMAGES = [torch.rand(3, 64, 96), torch.rand(3, 96, 64)]
TARGETS = [{"boxes": torch.tensor([[5.0, 5, 50, 50]]), "labels": torch.tensor([1])}] * 2


def model(name=STUDENT, **arguments):
    return build_model(name, num_classes=4, size=64, **arguments)


def build(student=None, teacher=None, method="ACAMKD", **arguments):
    """Return the student, with its distillation if there is a method."""
    student = student or model()
    plan = Plan(methods={method: {}} if method else {}, **{"inherit": "auto", **arguments})
    assert build_distillation(student, teacher or model(), plan) is getattr(student, "distillation", None)
    return student


def batches_of(backbone):
    """Remember what a backbone is given."""
    seen = []
    backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    return seen


def test_the_teacher_sees_the_batch_of_the_students_backbone():
    """torchvision resizes inside the detector, at random in training."""
    built = build(student=model("retinanet_mobilenet_v3_small_fpn32"))
    built.transform.min_size = (32, 48, 64)
    student, teacher = batches_of(built.backbone), batches_of(built.distillation.teacher.network)
    sizes = set()
    for _ in range(6):
        built(IMAGES, TARGETS)
        assert torch.equal(student[-1], teacher[-1])
        sizes.add(tuple(student[-1].shape))
    assert len(sizes) > 1 and len(student) == len(teacher) == 6


def test_other_pixel_statistics_are_translated():
    """SSDLite's 0.5 and 0.5: its black, -1, is the other's darkest colour."""
    built = build(student=model("ssdlite320_mobilenet_v3_large"), teacher=model("retinanet_resnet18_fpn32"))
    black = built.distillation.teacher.pixels(-torch.ones(1, 3, 2, 2))[0, :, 0, 0]
    torch.testing.assert_close(black, -torch.tensor([0.485 / 0.229, 0.456 / 0.224, 0.406 / 0.225]))
    assert build().distillation.teacher.pixels.identity


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("fcos_mobilenet_v3_small_fpn64", "retinanet_resnet18_fpn64"),
        ("fasterrcnn_resnet18_fpn32", "fcos_mobilenet_v3_small_fpn64"),
        ("ssdlite320_mobilenet_v3_large", "retinanet_resnet18_fpn32"),
    ],
)
def test_a_step_trains_student_and_distiller_and_leaves_the_teacher(student, teacher):
    teacher = model(teacher)
    built = build(model(student), teacher)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    flags = [p.requires_grad for p in teacher.parameters()]
    losses = built.train()(IMAGES, TARGETS)
    assert "loss_acam_spatial" in losses
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None for p in built.parameters() if p.requires_grad)
    assert all(torch.equal(before[n], value) for n, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters()) and all(m.training for m in teacher.modules())
    assert [p.requires_grad for p in teacher.parameters()] == flags and True in flags
    assert not any("teacher" in name for name in (*built.state_dict(), *dict(built.named_parameters())))


def test_neck_and_head_are_inherited_and_the_backbone_is_not():
    student, teacher = model(), model("fcos_resnet18_fpn64")
    start = {name: value.clone() for name, value in student.state_dict().items()}
    build(student, teacher, method="")
    other = teacher.state_dict()
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, start[name])}
    assert all(torch.equal(student.state_dict()[name], other[name]) for name in moved)
    assert any(name.startswith("head.") for name in moved) and any(".fpn." in name for name in moved)
    assert not any(name.startswith("backbone.body.") for name in moved)


def test_inheritance_is_for_pairs_of_one_kind_unless_asked_for():
    student, teacher = model("retinanet_mobilenet_v3_small_fpn64"), model()
    start = {name: value.clone() for name, value in student.state_dict().items()}
    build(student, teacher, method="")
    assert all(torch.equal(value, start[name]) for name, value in student.state_dict().items())
    build(student, teacher, method="", inherit="always")
    assert not all(torch.equal(value, start[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            {"student": "deeplabv3_mobilenet_v3_large", "teacher": "fcn_resnet50", "taps": ["backbone"]},
            (
                "teacher",
                "no stride that the student has too",
                "levels of the same strides",
                "student: out (stride 16, 960 channels); teacher: out (stride 8, 2048 channels)",
            ),
        ),
        ({"levels": ["p3"]}, ("levels", "p3", "levels of the student: 0, 1, 2, p6, p7")),
        (
            {"student": "fasterrcnn_resnet18_fpn32", "levels": ["0", "1"]},
            ("levels", "0", "levels whose stride the teacher has too"),
        ),
        (
            {"student": "fasterrcnn_resnet18_fpn32", "teacher": "ssd300_vgg16"},
            ("teacher", "a failure on 256 x 256 pixels: ", "one that takes the student's images"),
        ),
        ({"inherit": "sometimes"}, ("inherit", "sometimes", "one of auto, always, never")),
    ],
)
def test_pairs_that_do_not_fit_are_refused(arguments, error):
    arguments = {k: model(v) if k in ("student", "teacher") else v for k, v in arguments.items()}
    with refuses(*error):
        build(**arguments)


def test_a_method_needs_a_teacher():
    with refuses("teacher", "none", "a model to learn from", "or no {method}"):
        build_distillation(model(), None, Plan(methods={"Mimic": {}}))
    with refuses("teacher", "none", "a model to learn from", "{inherit} 'never'"):
        build_distillation(model(), None, Plan(inherit="always"))
    student = model()
    assert build_distillation(student, None, Plan(inherit="never")) is None and not hasattr(student, "distillation")


def test_a_level_without_a_partner_is_said(caplog):
    """It is a warning in both engines."""
    student = build(model("fcos_mobilenet_v3_small_fpn64"), model("fasterrcnn_resnet18_fpn32"))
    assert student.distillation.levels == {"0": "1", "1": "2", "2": "3", "p6": "pool"}
    (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
    message = record.getMessage()
    assert "not every level of the student has a partner of its stride, so p7 will not be distilled" in message
    assert "p7 (stride 128, 64 channels)" in message and "teacher: 0 (stride 4, 32 channels)" in message
    assert "loss_acam_spatial" in student.train()(IMAGES, TARGETS)
    caplog.clear()
    build(levels=["0"])
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_all_weights_are_loaded_or_it_is_an_error(tmp_path):
    good, path = model(), str(tmp_path / "w.pth")
    torch.save(good.state_dict(), path)
    other = model()
    load_weights(other, path, role="teacher")
    assert all(torch.equal(a, b) for a, b in zip(good.state_dict().values(), other.state_dict().values()))
    torch.save({"model": good.state_dict(), "epoch": 3}, path)  # as torchvision's recipes save
    load_weights(model(), path, role="teacher")

    def fails(state, value, allowed="this model's weights"):
        torch.save(state, path)
        with refuses("teacher_weights", value, allowed):
            load_weights(model(), path, role="teacher")

    state = dict(good.state_dict())
    fails(build_model(STUDENT, num_classes=9).state_dict(), "cls_logits.weight (9, 64, 3, 3) in the file, (4,")
    fails(plain(model("lraspp_mobilenet_v3_large")).state_dict(), " tensors (missing in the file: backbone.")
    fails(plain(model("lraspp_mobilenet_v3_large")).state_dict(), " more)")
    fails({**state, "x": torch.ones(1)}, "tensors (unknown to the model: x)")
    fails({"epoch": 3}, "which is no dict of tensors: it has epoch", "alone or under one of state_dict, model")
    (tmp_path / "w.pth").write_text("not a file of torch")
    with refuses("student_weights", "w.pth, which is a file of another kind", "a file of tensors by name"):
        load_weights(model(), path, role="student")
    with refuses("student_weights", f"no file {tmp_path}/gone.pth", "an existing one"):
        load_weights(model(), str(tmp_path / "gone.pth"), role="student")


def test_options_have_the_types_of_the_defaults():
    assert parse_options("ACAMKD", ["alpha=2", "standardize_fused=true", "mask_gradient=full", "num_masks=3"]) == {
        "ACAMKD": {"alpha": 2.0, "standardize_fused": True, "mask_gradient": "full", "num_masks": 3}
    }
    assert parse_options("Mimic", ["alpha=1e-3"]) == {"Mimic": {"alpha": 0.001}}
    assert parse_options("Mimic+ACAMKD", ["ACAMKD.alpha=2"]) == {"Mimic": {}, "ACAMKD": {"alpha": 2.0}}
    assert parse_options("", []) == {}


def test_former_names_and_values_of_options_are_read(caplog):
    _warn_once.cache_clear()
    expected = {"Mimic": {}, "ACAMKD": {"standardize_fused": True, "mask_gradient": "full"}}
    for _ in "ab":  # said once
        assert parse_options("Mimic+ACAMKD", ["acamkd.standardize=yes", "ACAMKD.mask_gradient=paper"]) == expected
    assert caplog.messages == [
        "--set ACAMKD.standardize is called --set ACAMKD.standardize_fused now; the former name is still read",
        "--set ACAMKD.mask_gradient: paper is called full now; the former value is still read",
    ]
    with refuses("ACAMKD.standardize", "3", "bool, as False"):
        parse_options("ACAMKD", ["standardize=3"])
    with refuses("ACAMKD.standardize_fused", "False and True", "one value"):
        parse_options("ACAMKD", ["standardize=true", "standardize_fused=false"])


@pytest.mark.parametrize(
    ("method", "pair", "allowed"),
    [
        ("ACAMKD", "alpha", "NAME=VALUE with alpha=1.0, lambda_div=1.0"),
        ("ACAMKD", "beta=2", "NAME=VALUE with alpha=1.0"),
        (
            "Mimic+ACAMKD",
            "alpha=2",
            "NAME=VALUE with Mimic.alpha=1.0, Mimic.features='raw', Mimic.levels=(), Mimic.taps=(), ACAMKD.alpha=1.0",
        ),
        ("", "alpha=2", "nothing without a method"),
    ],
)
def test_wrong_options_are_refused(method, pair, allowed):
    with refuses("options", pair, allowed):
        parse_options(method, [pair])


@pytest.mark.parametrize(
    ("pair", "value", "allowed"),
    [("num_masks=2.5", "2.5", "int, as 0"), ("num_masks=[", "[", "int, as 0"), ("alpha=much", "much", "float, as 1.0")],
)
def test_an_option_of_another_type_is_refused_by_its_name(pair, value, allowed):
    with refuses(f"ACAMKD.{pair.split('=')[0]}", value, allowed):
        parse_options("ACAMKD", [pair])


def test_levels_of_a_method_are_a_list():
    found = parse_options("PKD+KD", ["PKD.levels=0,1", "KD.taps=classes", "PKD.alpha=2"])
    assert found == {"PKD": {"levels": ("0", "1"), "alpha": 2.0}, "KD": {"taps": ("classes",)}}


def test_a_student_with_frozen_batch_norm_loads_in_one_without(tmp_path):
    """Pretrained backbones have it; what is saved has no counters of batches then."""
    frozen = model()
    state = {name: value for name, value in frozen.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pth")
    other = model()
    load_weights(other, str(tmp_path / "w.pth"), role="student")
    batch = torch.rand(1, 3, 64, 64)
    ours, theirs = (x.eval().backbone(batch)["0"] for x in (other, frozen))
    assert torch.equal(ours, theirs)
    model().load_state_dict(state)  # plain torch, strict
