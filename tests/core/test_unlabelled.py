"""Batches without labels: gradients by hand, what is left out, statistics, steps that are not distilled."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import acam_kd
from acam_kd.core.features import FeatureSpec
from acam_kd.core.methods import SeveralMethods
from acam_kd.core.reader import Reader
from acam_kd.core.targets import Targets
from acam_kd.core.unlabelled import Unlabelled
from acam_kd.core.weighting import WeightSchedule
from acam_kd.methods import ACAMKD, FGD, MGD, PKD, Mimic

from .detectors import P3, Detector, build, refused


@pytest.fixture
def batch():
    return torch.randn(2, 3, 16, 16)


def gradients(losses, model):
    model.zero_grad()
    sum(losses.values()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", [Mimic, PKD, ACAMKD, MGD])
def test_the_gradient_is_that_of_the_method_on_the_same_features(batch, method):
    model = build(method).train()
    teacher = model.distillation.teacher
    torch.manual_seed(1)
    found = model.distillation.unlabelled(batch)
    assert found and all(name.startswith("loss_unlabelled_") for name in found)
    mine = gradients(found, model)
    torch.manual_seed(1)
    losses = model.distillation.method(model.backbone(batch), teacher(batch), Targets())
    assert {f"loss_unlabelled_{name.removeprefix('loss_')}" for name in losses} == set(found)
    theirs = gradients(losses, model)
    assert mine.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in mine.items())
    assert mine["backbone.conv.weight"].abs().sum() > 0 and "head.weight" not in mine
    assert all(p.grad is None for p in teacher.network.parameters())


def test_both_losses_go_backward_together_and_the_labelled_step_stays_what_it_was(batch):
    model = build(PKD, student=Detector().train())
    alone = copy.deepcopy(model)
    losses = model(batch)
    metrics = model.distillation.metrics()
    other = model.distillation.unlabelled(torch.randn(3, 3, 24, 16))  # of another size
    assert model.distillation.metrics() == metrics and model.distillation.iteration == 0
    mine = gradients({**losses, **other}, model)
    labelled = gradients(alone(batch), alone)
    assert torch.equal(mine["head.weight"], labelled["head.weight"])
    assert not torch.equal(mine["backbone.conv.weight"], labelled["backbone.conv.weight"])
    assert set(model(batch)) == set(losses) and model.distillation.iteration == 1


def test_no_label_is_read(batch):
    def read(*args, **kwargs):
        raise AssertionError("asked for targets")

    model = acam_kd.distill(Detector(), Detector(), method=Mimic(P3, P3), targets=read).train()
    assert list(model.distillation.unlabelled(batch)) == ["loss_unlabelled_mimic_mse"]


def test_methods_that_need_annotations_are_left_out_by_name(batch, caplog):
    caplog.set_level("WARNING")
    both = SeveralMethods({"FGD": FGD(P3, P3), "PKD": PKD(P3, P3)})
    model = acam_kd.distill(Detector(), Detector(), method=both).train()
    for _ in range(2):
        assert list(model.distillation.unlabelled(batch)) == ["loss_unlabelled_pkd_pearson"]
    said = [record.getMessage() for record in caplog.records if "unlabelled" in record.getMessage()]
    assert said == ["FGD is left out on unlabelled images: it needs boxes"]


def test_a_method_that_can_use_no_such_image_is_refused(batch):
    model = acam_kd.distill(Detector(), Detector(), method=FGD(P3, P3)).train()
    with refused("method", "FGD, which needs boxes", "neither boxes nor labels", "PKD"):
        model.distillation.unlabelled(batch)


def test_statistics_are_updated_unless_they_are_to_be_kept(batch):
    model = build().train()
    before = copy.deepcopy(model.backbone.norm.state_dict())
    kept = model.distillation.unlabelled(batch, update_statistics=False)
    after = model.backbone.norm.state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())
    norm = model.backbone.norm
    assert norm.track_running_stats and norm.momentum == 0.1
    updated = model.distillation.unlabelled(batch)
    assert not torch.equal(norm.running_mean, before["running_mean"]) and int(norm.num_batches_tracked) == 1
    assert torch.equal(*(losses["loss_unlabelled_mimic_mse"] for losses in (kept, updated)))


def test_both_losses_have_a_backward_when_statistics_are_kept(batch):
    model = build().train()
    losses = model(batch)
    losses.update(model.distillation.unlabelled(batch, update_statistics=False))
    assert gradients(losses, model)["backbone.norm.weight"].isfinite().all()


def test_weight_and_period_count_here_too(batch):
    method = Mimic(P3, P3)
    schedule = {"warmup": 4, "stop_at": 3}
    model = build(Mimic, period=2).train()
    model.distillation.weighting.schedule = WeightSchedule(**schedule)
    whole = method(model.backbone(batch), model.distillation.teacher(batch))["loss_mimic_mse"].item()
    distillation = model.distillation
    found = []
    for step in range(5):
        distillation.iteration = step
        losses = distillation.unlabelled(batch)
        found.append(losses["loss_unlabelled_mimic_mse"].item() if losses else None)
    assert found == [pytest.approx(whole / 4), None, pytest.approx(3 * whole / 4), None, None]


def test_mode_gradients_and_batch_are_checked(batch):
    model = build()
    with refused("student", "evaluation mode", "training mode"):
        model.eval().distillation.unlabelled(batch)
    model.train()
    with refused("student", "no_grad", "gradients"), torch.no_grad():
        model.distillation.unlabelled(batch)
    with refused("batch", "torch.uint8 (1, 3, 16, 16)", "(N, C, H, W)"):
        model.distillation.unlabelled(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with refused("batch", "list"):
        model.distillation.unlabelled([batch])


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1))
        self.last = nn.Linear(8, 5)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.last(self.body(x).mean((2, 3)))


def test_levels_by_paths_run_the_student_itself_without_a_step(batch):
    """Its own output cannot carry losses; those of the labelled step wait, and are read once."""
    levels = {"c3": "body.2", "classes": "last"}
    student = acam_kd.distill(
        Classifier(), Classifier(), method="PKD+KD", student_levels=levels, teacher_levels=levels,
        example_inputs=torch.zeros(1, 3, 16, 16),
    )  # fmt: skip
    student.train().calls = 0
    student(batch)
    waiting = student.distillation.losses
    found = student.distillation.unlabelled(batch)
    assert student.calls == 2 and student.distillation.iteration == 0
    assert {name.replace("unlabelled_", "") for name in found} == set(waiting)
    for name, loss in waiting.items():
        assert torch.equal(loss, found[name.replace("loss_", "loss_unlabelled_")])
    student(batch)  # nothing waits: it was read
    assert student.distillation.iteration == 1


def test_copies_and_pickles_keep_working(batch):
    model = build(PKD).train()
    model.distillation.unlabelled(batch)
    twin = copy.deepcopy(model)
    assert gradients(twin.distillation.unlabelled(batch), twin)
    assert all(p.grad is None for p in model.parameters())
    pickle.dumps(model.distillation.on_unlabelled)


class Regions:
    """The class head of an R-CNN."""

    by_regions, taps = True, ()


def test_classes_of_regions_are_left_out_by_name(batch):
    levels = {**P3, "classes": FeatureSpec(3, 0, logits=True)}
    mimic = Mimic(P3, P3)
    both = SeveralMethods({"Mimic": mimic, "PKD": PKD(levels, levels)})
    unlabelled = Unlabelled(both, Reader([], class_head=Regions()))
    assert unlabelled.left_out == {"PKD": "compares the classes of regions, which are chosen by labels"}
    model = acam_kd.distill(Detector(), Detector(), method=mimic).train()
    assert list(unlabelled.losses(model.distillation, batch, update_statistics=True)) == ["loss_unlabelled_mimic_mse"]
    with refused("method", "PKD, which compares the classes of regions", "neither boxes nor labels"):
        Unlabelled(PKD(levels, levels), Reader([], class_head=Regions())).check()
