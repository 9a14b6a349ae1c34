"""A small student with losses of its own, attached."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import acam_kd

LEVELS = {"c3": "body.1", "c4": "body.3"}


def as_dict(loss, logits):
    return {"loss_cls": loss}


def one_loss(loss, logits):
    return loss


class Net(nn.Module):
    """A classifier that returns its losses, or what ``output`` says."""

    def __init__(self, width=4):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(2 * width, 3)
        self.output = as_dict
        self.fails = False

    def forward(self, x, labels=None):
        logits = self.head(self.body(x).mean((2, 3)))
        if self.fails:
            raise ZeroDivisionError
        if not self.training:
            return logits
        loss = F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.int64) if labels is None else labels)
        return self.output(loss, logits)


def attach(student=None, teacher=None, method="PKD", **arguments):
    arguments = {
        "student_levels": LEVELS,
        "teacher_levels": LEVELS,
        "example_inputs": torch.zeros(1, 3, 16, 16),
    } | arguments
    return acam_kd.distill(student or Net(), teacher or Net(), method=method, **arguments).train()


@contextmanager
def registered(distiller):
    """Make a method known by its name, for a while."""
    acam_kd.DISTILLER_REGISTRY.register()(distiller)
    try:
        yield
    finally:
        acam_kd.DISTILLER_REGISTRY._obj_map.pop(distiller.__name__)


@pytest.fixture
def x():
    return torch.randn(2, 3, 16, 16)


STATES = ["fresh", "after a step", "after a step that raised"]


@pytest.fixture(params=STATES)
def student(request, x):
    """An attached student with a method that has parameters."""
    model = attach(method="MGD")
    if request.param != "fresh":
        model(x)
    if request.param == "after a step that raised":
        model.fails = True
        with pytest.raises(ZeroDivisionError):
            model(x)
        model.fails = False
    return model


def hooks(model):
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
             "_forward_pre_hooks_with_kwargs")  # fmt: skip
    return {name: {key: dict(getattr(m, key)) for key in names} for name, m in model.named_modules()}
