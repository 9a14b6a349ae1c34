"""Student, teacher and method put together; weights that fit, or do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from acam_kd.tv.distillation import build_distillation, load_weights, parse_options
from acam_kd.tv.models import build_model, plain

STUDENT = "fcos_mobilenet_v3_small_fpn64"
IMAGES = [torch.rand(3, 64, 96), torch.rand(3, 96, 64)]
TARGETS = [{"boxes": torch.tensor([[5.0, 5, 50, 50]]), "labels": torch.tensor([1])}] * 2


def model(name=STUDENT, **arguments):
    return build_model(name, num_classes=4, size=64, **arguments)


def build(student=None, teacher=None, method="ACAMKD", **arguments):
    return build_distillation(
        student or model(), teacher or model(), methods={method: {}} if method else {}, **arguments
    )


class Spy(nn.Module):
    """Remembers what a backbone was given."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.batches = backbone, []

    def forward(self, batch):
        self.batches.append(batch.detach())
        return self.backbone(batch)


def test_the_teacher_sees_the_batch_of_the_students_backbone():
    """torchvision resizes inside the detector, at random in training."""
    built = build(student=model("retinanet_mobilenet_v3_small_fpn32"))
    built.student.transform.min_size = (32, 48, 64)
    spies = built.student.backbone, built.teacher.network = Spy(built.student.backbone), Spy(built.teacher.network)
    sizes = set()
    for _ in range(6):
        built(IMAGES, TARGETS)
        assert torch.equal(spies[0].batches[-1], spies[1].batches[-1])
        sizes.add(tuple(spies[0].batches[-1].shape))
    assert len(sizes) > 1


def test_other_pixel_statistics_are_translated():
    """SSDLite's 0.5 and 0.5: its black, -1, is the other's darkest colour."""
    built = build(student=model("ssdlite320_mobilenet_v3_large"), teacher=model("retinanet_resnet18_fpn32"))
    black = built.teacher.transform(-torch.ones(1, 3, 2, 2))[0, :, 0, 0]
    torch.testing.assert_close(black, -torch.tensor([0.485 / 0.229, 0.456 / 0.224, 0.406 / 0.225]))
    assert build().teacher.transform.identity


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("fcos_mobilenet_v3_small_fpn64", "retinanet_resnet18_fpn64"),
        ("fasterrcnn_resnet18_fpn32", "fcos_mobilenet_v3_small_fpn64"),
        ("ssdlite320_mobilenet_v3_large", "retinanet_resnet18_fpn32"),
    ],
)
def test_a_step_trains_student_and_distiller_and_leaves_the_teacher(student, teacher):
    built = build(model(student), model(teacher))
    before = {name: value.clone() for name, value in built.teacher.network.state_dict().items()}
    losses = built.train()(IMAGES, TARGETS)
    assert "loss_acam_spatial" in losses
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None for p in built.parameters() if p.requires_grad)
    assert all(torch.equal(before[n], value) for n, value in built.teacher.network.state_dict().items())
    assert not any("teacher" in name for name in built.state_dict())


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
    build(student, teacher, method="", inheritance="always")
    assert not all(torch.equal(value, start[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"student": "deeplabv3_mobilenet_v3_large", "teacher": "fcn_resnet50", "taps": ["backbone"]},
            r"share no stride.*student: out \(stride 16, 960 channels\); teacher: out \(stride 8, 2048 channels\)",
        ),
        ({"levels": ["p3"]}, r"unknown level 'p3'; the student has: 0, 1, 2, p6, p7 \(option: --levels\)"),
        ({"student": "fasterrcnn_resnet18_fpn32", "levels": ["0", "1"]}, r"no level for 0 \(option: --levels\)"),
        (
            {"student": "fasterrcnn_resnet18_fpn32", "teacher": "ssd300_vgg16"},
            "student and teacher do not take images of one size, 256 x 256: ",
        ),
        ({"inheritance": "sometimes"}, "auto, always, never, not 'sometimes'"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(arguments, message):
    arguments = {k: model(v) if k in ("student", "teacher") else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        build(**arguments)


def test_a_method_needs_a_teacher():
    with pytest.raises(ValueError, match="there is no teacher"):
        build_distillation(model(), None, methods={"Mimic": {}})
    assert build_distillation(model(), None, methods={}, inheritance="never").distiller is None


def test_all_weights_are_loaded_or_it_is_an_error(tmp_path):
    good, path = model(), str(tmp_path / "w.pth")
    torch.save(good.state_dict(), path)
    other = model()
    load_weights(other, path, role="teacher")
    assert all(torch.equal(a, b) for a, b in zip(good.state_dict().values(), other.state_dict().values()))
    torch.save({"model": good.state_dict(), "epoch": 3}, path)  # as torchvision's recipes save
    load_weights(model(), path, role="teacher")

    def fails(state, message, error=ValueError):
        torch.save(state, path)
        with pytest.raises(error, match=message) as caught:
            load_weights(model(), path, role="teacher")
        assert "--teacher-weights" in str(caught.value) and "\n" not in str(caught.value)

    state = dict(good.state_dict())
    fails(build_model(STUDENT, num_classes=9).state_dict(), r"cls_logits.weight is \(9, 64, 3, 3\) in the file, \(4,")
    fails(plain(model("lraspp_mobilenet_v3_large")).state_dict(), "missing in the file; .* and [0-9]+ more")
    fails({**state, "x": torch.ones(1)}, "x unknown to the model")
    fails({"epoch": 3}, "no dict of tensors")
    (tmp_path / "w.pth").write_text("not a file of torch")
    with pytest.raises(ValueError, match="cannot be loaded: "):
        load_weights(model(), path, role="student")
    with pytest.raises(FileNotFoundError, match="do not exist: tried .*gone.pth .option: --student-weights"):
        load_weights(model(), str(tmp_path / "gone.pth"), role="student")


def test_options_have_the_types_of_the_defaults():
    assert parse_options("ACAMKD", ["alpha=2", "standardize=true", "mask_gradient=paper", "num_masks=3"]) == {
        "ACAMKD": {"alpha": 2.0, "standardize": True, "mask_gradient": "paper", "num_masks": 3}
    }
    assert parse_options("Mimic", ["alpha=1e-3"]) == {"Mimic": {"alpha": 0.001}}
    assert parse_options("Mimic+ACAMKD", ["ACAMKD.alpha=2"]) == {"Mimic": {}, "ACAMKD": {"alpha": 2.0}}
    assert parse_options("", []) == {}


@pytest.mark.parametrize(
    ("method", "pair", "message"),
    [
        ("ACAMKD", "alpha", "--set alpha: ACAMKD knows alpha=1.0, lambda_div=1.0"),
        ("ACAMKD", "beta=2", "--set beta=2: ACAMKD knows alpha=1.0"),
        ("ACAMKD", "num_masks=2.5", "int is needed, as num_masks=0"),
        ("ACAMKD", "num_masks=[", "int is needed"),
        ("ACAMKD", "alpha=much", "float is needed, as alpha=1.0"),
        ("Mimic+ACAMKD", "alpha=2", "--set alpha=2: known are Mimic.alpha=1.0, ACAMKD.alpha=1.0"),
        ("", "alpha=2", "no method knows nothing, without a method"),
    ],
)
def test_wrong_options_are_refused(method, pair, message):
    with pytest.raises(ValueError, match=message):
        parse_options(method, [pair])


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
