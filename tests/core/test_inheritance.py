"""Inheritance: a student's neck and head start from the teacher's, and a report says which."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from acam_kd.core import ModuleAdapter, Plan, assemble, inherit

from .detectors import Detector, refused


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


class OfAKind(ModuleAdapter):
    kind = "Detector"


@pytest.mark.parametrize(
    ("how", "adapter", "inherits"),
    [
        ("always", ModuleAdapter, True),
        ("auto", OfAKind, True),
        ("auto", ModuleAdapter, False),
        ("never", OfAKind, False),
    ],
)
def test_inheritance_alone_leaves_nothing_attached(how, adapter, inherits):
    student, teacher = Detector(), Detector()
    own = {name: x.clone() for name, x in student.state_dict().items()}
    assert assemble(adapter(student), adapter(teacher, role="teacher"), Plan(inherit=how)) is None
    assert not hasattr(student, "distillation") and not student._forward_hooks
    assert torch.equal(student.head.weight, teacher.head.weight if inherits else own["head.weight"])
    assert all(torch.equal(x, own[name]) for name, x in student.state_dict().items() if name.startswith("backbone."))
    assert not torch.equal(own["head.weight"], teacher.head.weight)


def test_inheritance_that_cannot_be_is_refused():
    with refused("inherit", "sometimes", "one of auto, always, never"):
        assemble(ModuleAdapter(Detector()), ModuleAdapter(Detector()), Plan(inherit="sometimes"))
    with refused("teacher", "none", "a model to learn from", "or no {method} and {inherit} 'never'"):
        assemble(ModuleAdapter(Detector()), None, Plan(inherit="always"))
