"""Detectors of a few lines for the core's tests, and errors by their fields."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import nn

import acam_kd
from acam_kd.core import ConfigError, FeatureSpec
from acam_kd.methods import Mimic

P3 = {"p3": FeatureSpec(4, 8)}


class Backbone(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, channels, 3, stride=8, padding=1), nn.BatchNorm2d(channels)

    def forward(self, batch):
        return {"p3": self.norm(self.conv(batch))}


class Detector(nn.Module):
    """Resizes its input in training, inside, as torchvision's detectors do."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = Backbone(), nn.Conv2d(4, 2, 1)
        self.size = 16

    def forward(self, batch):
        if self.training and self.size != batch.shape[-1]:
            batch = nn.functional.interpolate(batch, (self.size, self.size))
        out = self.head(self.backbone(batch)["p3"])
        return {"loss_cls": out.square().mean()} if self.training else out


def build(method=Mimic, *, student=None, teacher=None, period=1, teacher_precision="", **arguments):
    """A student with a distillation of its backbone's only level."""
    return acam_kd.distill(
        student or Detector(),
        teacher or Detector(),
        method=method(P3, P3, **arguments),
        period=period,
        teacher_precision=teacher_precision,
    )


@contextmanager
def refused(argument, value="", allowed="", hint="") -> Iterator[pytest.ExceptionInfo[ConfigError]]:
    """Expect a ConfigError with this argument, whose other fields have these parts, and which is one line."""
    with pytest.raises(ConfigError) as error:
        yield error
    found = error.value
    assert found.argument == argument, str(found)
    for part, field in ((value, found.value), (allowed, found.allowed), (hint, found.hint)):
        assert part in str(field), f"{part!r} is not in {field!r}"
    assert str(found).startswith(f"{argument}: found ") and "\n" not in str(found)
