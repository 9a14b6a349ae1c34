"""The training step, with a detector of a few lines: what is trained, saved, moved, seen by whom, refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from acam_kd.core import (
    DistillationModel,
    FeatureSpec,
    FrozenTeacher,
    MethodTap,
    PixelTransform,
    Predictions,
    Targets,
    inherit,
)
from acam_kd.core.distillers import ACAMKD, KD, Mimic
from acam_kd.core.methods import SeveralMethods


class Backbone(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, channels, 3, stride=8, padding=1), nn.BatchNorm2d(channels)

    def forward(self, batch):
        return {"p3": self.norm(self.conv(batch))}


class Detector(nn.Module):
    """Resizes its input at random in training, inside, as torchvision's detectors do."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = Backbone(), nn.Conv2d(4, 2, 1)
        self.sizes = [16]

    def forward(self, batch):
        size = self.sizes[int(torch.randint(len(self.sizes), ()))]
        batch = nn.functional.interpolate(batch, (size, size)) if size != batch.shape[-1] else batch
        out = self.head(self.backbone(batch)["p3"])
        return {"loss_cls": out.square().mean()} if self.training else out


def build(method=Mimic, **arguments):
    levels = {"p3": FeatureSpec(4, 8)}
    return DistillationModel(
        student=Detector(),
        teacher=FrozenTeacher(Backbone()),
        distiller=method(levels, {"p3": FeatureSpec(4, 8)}, **arguments),
        levels={"p3": "p3"},
    )


@pytest.fixture
def batch():
    return torch.randn(2, 3, 16, 16)


def test_evaluation_is_exactly_the_student(batch):
    model = build().eval()
    assert torch.equal(model(batch), model.student(batch))


def test_training_adds_the_losses_and_their_gradients_stay_out_of_the_teacher(batch):
    model = build(ACAMKD)
    losses = model(batch)
    assert set(losses) == {"loss_cls", "loss_acam_spatial", "loss_acam_channel", "loss_acam_diversity"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in model.teacher.network.parameters())


def test_distillation_reaches_the_students_backbone(batch):
    model = build()
    model(batch)["loss_mimic_mse"].backward()
    assert model.student.backbone.conv.weight.grad.abs().sum() > 0
    assert model.student.head.weight.grad is None


def test_the_teacher_is_nobodys_submodule(batch):
    model = build()
    teacher = {id(p) for p in model.teacher.network.parameters()}
    assert not teacher & {id(p) for p in model.parameters()}
    assert not [name for name in model.state_dict() if "teacher" in name]
    assert not [name for name, _ in model.named_modules() if "teacher" in name]


def test_the_teacher_never_trains(batch):
    model = build().train()
    before = {k: v.clone() for k, v in model.teacher.network.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    for _ in range(2):
        sum(model(batch).values()).backward()
        optimizer.step()
    assert not model.teacher.network.training
    assert all(torch.equal(v, before[k]) for k, v in model.teacher.network.state_dict().items())
    assert not model.teacher(batch)["p3"].requires_grad


def test_the_teacher_follows_the_model(batch):
    model = build().to(torch.float64)
    assert model.teacher.network.conv.weight.dtype == torch.float64
    model(batch.double())
    model.teacher.transform = PixelTransform(**BGR, **RGB)
    model.to("meta")
    assert next(model.teacher.network.parameters()).device.type == "meta"
    assert model.teacher.transform.scale.device.type == "meta"


def test_the_teacher_gets_the_very_batch_of_the_student(batch):
    model, seen = build(), []
    model.student.sizes = [32, 48]
    model.teacher.network.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    model.student.backbone.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    model(batch)
    assert seen[0] is seen[1] and seen[0].shape[-1] in (32, 48)


def test_a_deep_copy_distils_on_its_own(batch):
    model = build()
    twin = copy.deepcopy(model)
    first = {k: v.item() for k, v in twin(batch).items()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert {k: v.item() for k, v in twin(batch).items()} == pytest.approx(first, rel=1e-3)
    assert twin.teacher is not model.teacher


def test_nothing_to_distil_is_the_student_alone(batch):
    model = DistillationModel(student=Detector(), teacher=None, distiller=None, levels={})
    assert set(model(batch)) == {"loss_cls"} and model.metrics() == {}
    copy.deepcopy(model)  # no feature map is kept
    with pytest.raises(ValueError, match="a teacher needs a distiller"):
        DistillationModel(student=Detector(), teacher=None, distiller=build().distiller, levels={})


def test_a_backbone_without_gradient_is_an_error(batch):
    model = build()
    model.student.backbone.requires_grad_(False)
    with pytest.raises(RuntimeError, match="frozen, or checkpointed"):
        model(batch)
    with torch.no_grad():  # as PreciseBN calls it
        model(batch)


def test_a_student_whose_backbone_does_not_run_is_an_error(batch):
    class Bypass(Detector):
        def forward(self, batch):
            return {"loss_cls": self.head(self.backbone.forward(batch)["p3"]).mean()}  # hooks do not fire

    model = build()
    model = DistillationModel(student=Bypass(), teacher=model.teacher, distiller=model.distiller, levels=model.levels)
    with pytest.raises(RuntimeError, match="nothing to distil"):
        model(batch)


def test_a_student_without_backbone_is_an_error():
    with pytest.raises(ValueError, match="Conv2d has no module called `backbone`"):
        DistillationModel(student=nn.Conv2d(1, 1, 1), teacher=None, distiller=None, levels={})


def test_maps_of_other_sizes_are_an_error(batch):
    model = build()
    model.teacher.network.conv.stride = (4, 4)
    with pytest.raises(ValueError, match=r"level p3 of the student is \(2, 2\), level p3 of the teacher is \(4, 4\)"):
        model(batch)


def test_non_finite_losses_are_named_with_term_level_and_time(batch):
    model = build(ACAMKD)
    model.raise_if_not_finite(model(batch), when="iteration 6")
    with torch.no_grad():
        model.teacher.network.norm.running_mean.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"iteration 7: .*loss_acam_spatial = nan.*p3/spatial_mse"):
        model.raise_if_not_finite(model(batch), when="iteration 7")


def test_ratio_of_distillation_to_task(batch):
    model = build(alpha=2.0)
    losses = model(batch)
    assert model.metrics()["distillation_to_task"].item() == pytest.approx(
        (losses["loss_mimic_mse"] / losses["loss_cls"]).item()
    )


BGR = {"student_mean": [103.5, 116.3, 123.7], "student_std": [1.0, 1.0, 1.0]}
RGB = {"teacher_mean": [123.7, 116.3, 103.5], "teacher_std": [58.4, 57.1, 57.4]}


def test_an_image_of_the_mean_colour_is_zero_to_the_teacher():
    transform = PixelTransform(**BGR, **RGB, reverse_channels=True)
    torch.testing.assert_close(transform(torch.zeros(1, 3, 2, 2)), torch.zeros(1, 3, 2, 2))


def test_pixels_are_what_the_teacher_would_have_made_of_them():
    bgr = torch.rand(1, 3, 4, 4) * 255
    student = (bgr - torch.tensor(BGR["student_mean"]).view(3, 1, 1)) / torch.tensor([2.0, 3.0, 4.0]).view(3, 1, 1)
    mean, std = (torch.tensor(RGB[k]).view(3, 1, 1) for k in ("teacher_mean", "teacher_std"))
    transform = PixelTransform(
        student_mean=BGR["student_mean"], student_std=[2.0, 3.0, 4.0], **RGB, reverse_channels=True
    )
    torch.testing.assert_close(transform(student), (bgr.flip(1) - mean) / std, rtol=1e-4, atol=1e-4)


def test_equal_statistics_leave_the_batch_alone(batch):
    same = {"teacher_mean": BGR["student_mean"], "teacher_std": BGR["student_std"]}
    assert PixelTransform(**BGR, **same)(batch) is batch


def test_inheritance_copies_what_fits_and_reports_the_rest():
    student, teacher = Detector(), Detector()
    student.extra = nn.Linear(2, 2)
    teacher.head = nn.Conv2d(4, 3, 1)
    teacher.neck, student.neck = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    own = student.backbone.conv.weight.clone()
    report = inherit(student, teacher, exclude=["backbone."])
    assert sorted(report.copied) == ["neck.bias", "neck.weight"]
    assert torch.equal(student.neck.weight, teacher.neck.weight)
    assert torch.equal(student.backbone.conv.weight, own)
    assert report.skipped["head.bias"] == "(2,) here, (3,) in the teacher"
    assert report.skipped["extra.weight"] == "the teacher has no tensor of that name"
    assert "inherited 2 tensors" in str(report) and "skipped 4" in str(report)


def test_observing_gives_masks_and_changes_nothing(batch):
    model = build(ACAMKD)
    before = copy.deepcopy(model.student.state_dict())
    masks = model.observe(batch)["p3"]
    assert masks["spatial"].shape == (2, 6, 2, 2) and masks["channel"].shape == (2, 6, 4)
    assert not masks["spatial"].requires_grad and model.training and model.student.backbone.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.student.state_dict().items())
    with torch.no_grad():
        model.student.backbone.conv.weight.mul_(-3)
    assert not torch.equal(model.observe(batch)["p3"]["spatial"], masks["spatial"])  # they move with the student
    assert build(Mimic).observe(batch) == {}


def extract(network, batch):
    features = network.backbone(batch)
    return {**features, "logits": network.head(features["p3"])}


def build_on_logits(method=Mimic, teacher_stride=8, **arguments):
    spec = {"logits": FeatureSpec(2, 8, logits=True)}
    student, teacher = Detector(), Detector()
    teacher.backbone.conv.stride = (teacher_stride, teacher_stride)
    return DistillationModel(
        student=student,
        teacher=FrozenTeacher(teacher, extract=extract),
        distiller=method(spec, spec, **arguments),
        levels={"logits": "logits"},
        logits=student.head,
        extract=extract,
    )


def test_logits_are_tapped_where_they_are_made(batch):
    model = build_on_logits()
    losses = model(batch)
    student, teacher = (extract(x, batch)["logits"] for x in (model.student, model.teacher.network))
    torch.testing.assert_close(losses["loss_mimic_mse"], (student - teacher).square().mean())
    losses["loss_mimic_mse"].backward()
    assert model.student.head.weight.grad.abs().sum() > 0 and model.student.backbone.conv.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.teacher.network.parameters())
    assert model(batch)  # nothing was left in a tap


def test_a_teachers_logits_of_another_stride_are_resized_corner_to_corner(batch):
    model = build_on_logits(teacher_stride=4)
    student, teacher = (extract(x, batch)["logits"] for x in (model.student, model.teacher.network))
    assert student.shape[2:] == (2, 2) and teacher.shape[2:] == (4, 4)
    corners = teacher[:, :, ::3, ::3]
    torch.testing.assert_close(model(batch)["loss_mimic_mse"], (student - corners).square().mean())


def test_masks_on_logits_can_be_observed_and_a_deep_copy_is_its_own(batch):
    model = build_on_logits(ACAMKD)
    assert model.observe(batch)["logits"]["spatial"].shape == (2, 2, 2, 2)
    twin = copy.deepcopy(model)
    twin(batch)
    with torch.no_grad():
        twin.student.head.weight.zero_()
        twin.student.head.bias.fill_(5.0)
    before = model(batch)["loss_acam_spatial"]
    assert twin(batch)["loss_acam_spatial"] != before
    assert not [name for name in model.state_dict() if "teacher" in name]


class ClassReader:
    """What an engine's reader of a class head does: logits of every position are an anchor's, or a region's."""

    def __init__(self, head, regions=None):
        self.tap, self.regions, self.fails = MethodTap(head, "forward"), regions, False

    def pop(self):
        _, logits = self.tap.pop()
        logits = logits.flatten(2)[..., None]
        labels = torch.arange(logits.shape[2]).expand(len(logits), -1)[..., None] % 3 - 1
        return Predictions(logits, labels, self.regions)

    def clear(self):
        self.tap.clear()


class Known(Mimic):
    """Keeps what it was told."""

    reads = ("backbone", "logits", "classes")
    needs = ("boxes", "labels")

    def forward(self, student, teacher, targets):
        self.targets, self.student = targets, student
        return super().forward(student, teacher)


def build_on_classes(method=Known, regions=None, levels=("p3", "classes")):
    spec = {"p3": FeatureSpec(4, 8), "classes": FeatureSpec(2, 0, logits=True, sigmoid=True)}
    spec = {level: spec[level] for level in levels}
    asked = []

    def extract(network, batch, regions):
        asked.append(regions)
        features = network.backbone(batch)
        return {**features, "classes": network.head(features["p3"]).flatten(2)[..., None]}

    student = Detector()
    model = DistillationModel(
        student=student,
        teacher=FrozenTeacher(Detector(), extract=extract),
        distiller=method(spec, spec),
        levels={level: level for level in levels},
        class_head=ClassReader(student.head, regions),
        read_targets=lambda batch: Targets(boxes=torch.full((1, 4), float(len(batch)))),
    )
    return model, asked


def test_the_class_head_is_distilled_beside_the_backbone(batch):
    model, asked = build_on_classes(regions="those of the student")
    losses = model(batch)
    assert asked == ["those of the student"]
    student = model.student(batch.detach())["loss_cls"]  # in training: the same forward
    assert torch.equal(student, losses["loss_cls"])
    model._class_head.clear()
    known = model.distiller.targets
    assert torch.equal(known.labels["classes"], torch.tensor([[[-1], [0], [1], [-1]]] * 2))
    assert known.boxes.tolist() == [[2.0] * 4]
    assert model.distiller.student["classes"].shape == (2, 2, 4, 1)
    losses["loss_mimic_mse"].backward()
    assert model.student.head.weight.grad.abs().sum() > 0 and model.student.backbone.conv.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.teacher.network.parameters())


def test_a_method_gets_its_levels_only_and_targets_are_read_if_needed(batch):
    model, _ = build_on_classes(levels=("classes",))
    model(batch)
    assert list(model.distiller.student) == ["classes"]
    model, _ = build_on_classes(Mimic)
    model._read_targets = None  # would be called
    assert "loss_mimic_mse" in model(batch)


def test_a_step_that_failed_leaves_nothing_in_the_next(batch):
    model, _ = build_on_classes()
    head = model.student.head
    handle = head.register_forward_hook(lambda *_: 1 / 0)  # after the tap has recorded
    with pytest.raises(ZeroDivisionError):
        model(batch)
    handle.remove()
    fresh = model(batch)
    assert fresh["loss_mimic_mse"].isfinite() and model.distiller.student["classes"].requires_grad


def test_other_numbers_of_anchors_are_refused(batch):
    model, _ = build_on_classes(levels=("classes",))
    model.teacher.network.backbone.conv.stride = (4, 4)
    with pytest.raises(ValueError, match="class head predicts for 4 anchors, the teacher's for 16: .*DISTILL.TAPS"):
        model(batch)


def test_a_deep_copy_reads_its_own_class_head(batch):
    model, _ = build_on_classes()
    twin = copy.deepcopy(model)
    sum(twin(batch).values()).backward()
    assert model.student.head.weight.grad is None and twin.student.head.weight.grad is not None
    with pytest.raises(RuntimeError, match="ran 0 times"):
        model._class_head.pop()


def test_labels_are_taken_at_the_nearest_position_of_the_logits(batch):
    model = build_on_logits(Known)
    labels = torch.full((2, 16, 16), -1)
    labels[:, 4::8, 4::8] = torch.tensor([[0, 1], [1, 0]])  # the middles of the 2 x 2 cells
    model._read_targets = lambda batch: Targets(labels={"logits": labels})
    model(batch)
    assert model.distiller.targets.labels["logits"].tolist() == [[[0, 1], [1, 0]]] * 2
    small = torch.tensor([[[0, -1], [1, 1]]] * 2)
    model._read_targets = lambda batch: Targets(labels={"logits": small})
    model(batch)
    assert model.distiller.targets.labels["logits"] is small


def test_labels_of_pixels_are_left_out_where_the_backbone_alone_is_distilled(batch):
    """An engine reads whatever annotations there are; those of a map that is not distilled have no size."""
    model = build(Known)
    model._read_targets = lambda batch: Targets(labels={"logits": torch.zeros(2, 16, 16)})
    assert "loss_mimic_mse" in model(batch)
    assert model.distiller.targets.labels == {}


def test_observing_several_methods_gives_the_masks_of_the_first_that_needs_no_targets(batch):
    class Blind(ACAMKD):
        needs = ("boxes",)

    student = Detector()
    spec = {"p3": FeatureSpec(4, 8)}
    classes = {"classes": FeatureSpec(2, 0, logits=True, sigmoid=True)}
    parts = {"Blind": Blind(spec, spec, num_masks=2), "Mimic": Mimic(spec, spec)}
    parts |= {"KD": KD(classes, classes), "ACAMKD": ACAMKD(spec, spec, num_masks=3)}
    model = DistillationModel(
        student=student,
        teacher=FrozenTeacher(Backbone()),
        distiller=SeveralMethods(parts),
        levels={"p3": "p3", "classes": "classes"},
        class_head=ClassReader(student.head),
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert model.observe(batch)["p3"]["spatial"].shape == (2, 3, 2, 2)
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(RuntimeError, match="ran 0 times"):
        model._class_head.pop()
