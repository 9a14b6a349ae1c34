"""Checks of what only a training step shows: maps, gradients, annotations, and the optimizer."""

from __future__ import annotations

import copy
import gc
import logging

import pytest
import torch
from torch import nn

import acam_kd
from acam_kd.core import FeatureSpec, Targets
from acam_kd.core.checks import OptimizerWatch, check_gradients, check_pair, check_targets, frozen_levels
from acam_kd.core.methods import SeveralMethods
from acam_kd.methods import ACAMKD, DKD, KD, PKD, Mimic

from .detectors import Detector, build, refused

TWO = {"p3": FeatureSpec(4, 8), "p4": FeatureSpec(4, 16)}
CLASSES = {"classes": FeatureSpec(3, 0, logits=True, sigmoid=True)}
MAP = {"logits": FeatureSpec(3, 8, logits=True)}


def maps(grad=(), **shapes):
    return {level: torch.randn(shape, requires_grad=level in grad) for level, shape in shapes.items()}


# Maps of one batch.


def pair(student, teacher, level="p3", channels=(4, 6)):
    of_teacher = f"{level} of the teacher"
    shapes = {"student": {level: FeatureSpec(channels[0], 8)}, "teacher": {of_teacher: FeatureSpec(channels[1], 8)}}
    check_pair({level: torch.zeros(student)}, {level: torch.zeros(teacher)}, {level: of_teacher}, shapes)


def test_maps_that_fit_pass_whatever_the_teacher_calls_them():
    pair((2, 4, 5, 6), (2, 6, 5, 6))


def test_channels_that_were_not_declared_are_refused():
    hint = "its output_shape and its maps differ"
    with refused("student", "5 channels at level p3", "the 4 that it declares", hint):
        pair((2, 5, 5, 6), (2, 6, 5, 6))
    with refused("teacher", "4 channels at level p3 of the teacher", "the 6 that it declares", hint):
        pair((2, 4, 5, 6), (2, 4, 5, 6))


def test_another_number_of_maps_than_images_is_refused():
    with refused("student", "6 maps at level p3", "2, one for each image", "leave p3 out of {levels}"):
        pair((6, 4, 5, 6), (2, 6, 5, 6))


def test_other_sizes_are_refused_with_what_to_do():
    found = "5 x 7 positions at level p3 of the teacher"
    with refused("teacher", found, "the 5 x 6 of the student's p3", "leave p3 out of {levels}"):
        pair((2, 4, 5, 6), (2, 6, 5, 7))
    found, hint = "16 x 1 positions at level classes of the teacher", "for the same anchors; see {method}"
    with refused("teacher", found, "the 9 x 1 of the student's classes", hint):
        pair((2, 3, 9, 1), (2, 3, 16, 1), level="classes", channels=(3, 3))


def test_every_level_is_looked_at():
    student, teacher = maps(p3=(1, 4, 4, 4), p4=(1, 4, 2, 2)), maps(p3=(1, 4, 4, 4), p4=(1, 4, 3, 3))
    with refused("teacher", "3 x 3 positions at level p4", "the 2 x 2 of the student's p4"):
        check_pair(student, teacher, {"p3": "p3", "p4": "p4"}, {"student": TWO, "teacher": TWO})


# Gradients.


def test_levels_without_a_gradient_are_listed():
    method = Mimic(TWO, TWO)
    assert frozen_levels(maps(("p3", "p4"), p3=(1, 4, 2, 2), p4=(1, 4, 1, 1)), method) == []
    assert frozen_levels(maps(("p4",), p3=(1, 4, 2, 2), p4=(1, 4, 1, 1)), method) == ["p3"]


def test_no_gradient_at_any_level_of_one_method_is_refused():
    student = maps(("classes",), p3=(1, 4, 2, 2), p4=(1, 4, 1, 1), classes=(1, 3, 4, 1))
    with refused("student", "no gradient at p3, p4", "one, for Mimic to train", "use_reentrant=True (use False)"):
        frozen_levels(student, Mimic(TWO, TWO))
    several = SeveralMethods({"KD": KD(CLASSES, CLASSES), "Mimic": Mimic(TWO, TWO)})
    with refused("student", "no gradient at p3, p4", "one, for Mimic to train", "choose other {levels}"):
        frozen_levels(student, several)
    assert frozen_levels(student, KD(CLASSES, CLASSES)) == []


def test_a_frozen_level_beside_others_is_a_warning_once(caplog):
    class Two(Detector):
        def __init__(self):
            super().__init__()
            self.low, self.high = nn.Conv2d(3, 4, 8, stride=8), nn.Conv2d(4, 4, 2, stride=2)
            self.low.requires_grad_(False)

        def forward(self, batch):
            return self.high(self.low(batch))

    student, levels = Two(), {"p3": "low", "p4": "high"}
    acam_kd.distill(student, Two(), method="Mimic", student_levels=levels, teacher_levels=levels)
    with caplog.at_level(logging.WARNING, "acam_kd"):
        for _ in range(2):
            student(torch.randn(1, 3, 16, 16))
            assert student.distillation.losses
    (record,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert record.message.startswith("no gradient reaches the student at p3: leave these levels out")


class Detached(Mimic):
    """Cuts the student off."""

    def forward(self, student, teacher, targets=None):
        return super().forward({level: x.detach() for level, x in student.items()}, teacher)


def test_losses_that_do_not_depend_on_the_student_are_refused():
    student, teacher = maps(("p3",), p3=(1, 4, 2, 2), p4=(1, 4, 1, 1)), maps(p3=(1, 4, 2, 2), p4=(1, 4, 1, 1))
    fields = "none of whose losses depends on the student", "a loss with a gradient", "detach the student's features?"
    method = Mimic(TWO, TWO)
    losses = method(student, teacher)
    check_gradients(method, student, losses)
    assert student["p3"].grad is None and all(p.grad is None for p in method.parameters())  # nothing is left behind
    losses["loss_mimic_mse"].backward()  # the graph is still there
    for method, losses in (
        (Detached(TWO, TWO), Detached(TWO, TWO)(student, teacher)),
        (Mimic(TWO, TWO), {"loss": torch.zeros(())}),
        (Mimic(TWO, TWO), {}),
    ):
        with refused("method", f"{type(method).__name__}, {fields[0]}", *fields[1:]):
            check_gradients(method, student, losses)


def test_a_method_that_detaches_is_refused_in_its_first_step_and_one_of_several_too():
    batch = torch.randn(2, 3, 16, 16)
    with refused("method", "Detached, none of whose losses"):
        build(Detached)(batch)
    with refused("method", "Detached, none of whose losses"):
        build(lambda *specs: SeveralMethods({"Mimic": Mimic(*specs), "Detached": Detached(*specs)}))(batch)


def test_the_gradient_is_looked_at_in_the_first_step_only(monkeypatch):
    seen = []
    monkeypatch.setattr("acam_kd.core.comparison.check_gradients", lambda part, *_: seen.append(part))
    model = build()
    for _ in range(3):
        model(torch.randn(2, 3, 16, 16))
    assert seen == [model.distillation.method]


# Annotations.


class Boxes(Mimic):
    needs = ("boxes",)


SIZES = torch.full((2, 2), 16.0)


def test_boxes_that_do_not_come_are_refused():
    fields = "no boxes", "the boxes of every image in training", "Boxes needs them: give {targets}, or choose"
    method = Boxes(TWO, TWO)
    for targets in (Targets(), Targets(boxes=torch.zeros(3, 4)), Targets(image_sizes=SIZES)):
        with refused("targets", *fields):
            check_targets(method, targets, TWO)
    with refused("targets", *fields):
        check_targets(SeveralMethods({"Mimic": Mimic(TWO, TWO), "Boxes": method}), Targets(), TWO)
    check_targets(method, Targets(boxes=torch.zeros(0, 4), image_sizes=SIZES), TWO)  # no objects are no unknown
    check_targets(Mimic(TWO, TWO), Targets(), TWO)


def test_rotated_boxes_are_refused():
    with refused("targets", "boxes of 5 numbers", "axis-aligned boxes of 4: x0, y0, x1, y1", "Boxes needs them"):
        check_targets(Boxes(TWO, TWO), Targets(boxes=torch.zeros(3, 5), image_sizes=SIZES), TWO)


def test_labels_that_do_not_come_are_refused():
    fields = "a label for every position", "DKD needs them: give {targets}"
    for spec in (CLASSES, MAP):
        (level,) = spec
        method = DKD(spec, spec)
        for labels in ({}, {"other": torch.zeros(2, 3, 3)}):
            with refused("targets", f"no labels for {level}", *fields):
                check_targets(method, Targets(labels=labels), spec)
        check_targets(method, Targets(labels={level: torch.zeros(2, 3, 3)}), spec)


def test_features_have_no_labels():
    class Both(Mimic):
        needs = ("labels",)

    spec = {**TWO, **MAP}
    check_targets(Both(spec, spec), Targets(labels={"logits": torch.zeros(2, 3, 3)}), spec)
    with refused("targets", "no labels for logits", "a label for every position") as error:
        check_targets(Both(spec, spec), Targets(), spec)
    assert error.value.value == "no labels for logits"


def test_a_step_without_the_annotations_that_a_method_needs_is_refused():
    model = build(Boxes)
    with refused("targets", "no boxes", "the boxes of every image in training", "Boxes needs them"):
        model(torch.randn(2, 3, 16, 16))


# The optimizer.


def watched():
    student = nn.ModuleDict({"own": nn.Linear(2, 2), "method": nn.Linear(2, 2)})
    return student, student["method"], OptimizerWatch(student, student["method"])


def steps(*optimizers, times=2):
    for _ in range(times):
        for optimizer in optimizers:
            optimizer.step()


def test_two_steps_of_an_optimizer_without_the_method_are_noticed():
    student, _, watch = watched()
    optimizer = torch.optim.SGD(student["own"].parameters(), lr=0.1)
    optimizer.step()
    assert not watch.forgotten
    optimizer.step()
    assert watch.forgotten
    watch.remove()


def test_both_in_one_optimizer_or_in_two_are_right():
    student, method, watch = watched()
    steps(torch.optim.SGD(student.parameters(), lr=0.1), times=3)
    assert not watch.forgotten
    watch.remove()
    for order in (1, -1):
        student, method, watch = watched()
        both = [torch.optim.AdamW(part.parameters()) for part in (student["own"], method)][::order]
        steps(*both, times=3)
        assert not watch.forgotten
        watch.remove()


def test_it_goes_by_membership_not_by_movement():
    student, method, watch = watched()
    groups = [{"params": student["own"].parameters()}, {"params": method.parameters(), "lr": 0.0}]
    steps(torch.optim.SGD(groups, lr=0.0), times=5)
    assert not watch.forgotten
    watch.remove()


def test_optimizers_of_others_count_for_nothing():
    student, _, watch = watched()
    steps(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), times=5)
    assert not watch.forgotten and watch.steps == 0
    watch.remove()


def test_a_method_without_parameters_is_never_forgotten():
    student = nn.Linear(2, 2)
    watch = OptimizerWatch(student, nn.Identity())
    steps(torch.optim.SGD(student.parameters(), lr=0.1), times=5)
    assert not watch.forgotten
    watch.remove()


def test_a_watch_that_is_removed_or_gone_looks_at_nothing():
    student, _, watch = watched()
    optimizer = torch.optim.SGD(student["own"].parameters(), lr=0.1)
    watch.remove()
    steps(optimizer)
    assert watch.steps == 0
    student, _, watch = watched()
    del watch
    gc.collect()
    steps(torch.optim.SGD(student["own"].parameters(), lr=0.1))


WARNING = "the method's parameters are in no optimizer that trains the student"


def train(model, optimizers, *, times=5, accumulate=1):
    for _ in range(times):
        for _ in range(accumulate):
            sum(model(torch.randn(2, 3, 16, 16)).values()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.fixture
def warned(caplog):
    caplog.set_level(logging.WARNING, "acam_kd")
    return lambda: [record.message for record in caplog.records if WARNING in record.message]


def of_student(model):
    return [p for name, p in model.named_parameters() if not name.startswith("distillation.")]


def test_a_method_that_is_in_no_optimizer_is_a_warning_once_after_two_steps(warned):
    model = build(ACAMKD)
    optimizers = [torch.optim.SGD(of_student(model), lr=0.01)]
    train(model, optimizers, times=2)
    assert warned() == []
    train(model, optimizers, times=3)
    (message,) = warned()
    assert "student.parameters()" in message and "student.distillation.parameters()" in message


def test_one_optimizer_that_was_built_before_attaching_is_noticed(warned):
    student = Detector()
    optimizer = torch.optim.AdamW(student.parameters())
    train(build(ACAMKD, student=student), [optimizer])
    assert len(warned()) == 1


@pytest.mark.parametrize("rate", [0.01, 0.0])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_method_in_the_students_optimizer_or_in_one_of_its_own_is_no_warning(warned, rate, accumulate):
    model = build(ACAMKD)
    train(model, [torch.optim.SGD(model.parameters(), lr=rate)], accumulate=accumulate)
    model = build(ACAMKD)
    parts = of_student(model), model.distillation.parameters()
    train(model, [torch.optim.SGD(part, lr=rate) for part in parts], accumulate=accumulate)
    assert warned() == []


def test_accumulating_is_no_reason_to_warn_early(warned):
    """Steps of the optimizer count, not the student's."""
    model = build(ACAMKD)
    optimizer = torch.optim.SGD(of_student(model), lr=0.01)
    train(model, [optimizer], times=1, accumulate=5)
    assert warned() == []
    train(model, [optimizer], times=1, accumulate=1)
    assert warned() == []  # two steps are made, and the next forward says so
    train(model, [optimizer], times=1, accumulate=1)
    assert len(warned()) == 1


def test_a_copy_looks_at_optimizers_of_its_own(warned):
    model = build(ACAMKD)
    model(torch.randn(2, 3, 16, 16))
    twin = copy.deepcopy(model)
    train(twin, [torch.optim.SGD(twin.parameters(), lr=0.01)])
    train(model, [torch.optim.SGD(model.parameters(), lr=0.01)])
    assert warned() == []


def test_methods_without_parameters_and_models_without_the_distillation_are_not_watched(warned):
    model = build(ACAMKD)
    model(torch.randn(2, 3, 16, 16))
    model.distillation.remove()
    train(model, [torch.optim.SGD(model.parameters(), lr=0.01)])
    model = build(PKD)
    train(model, [torch.optim.SGD(of_student(model), lr=0.01)])
    assert warned() == []
