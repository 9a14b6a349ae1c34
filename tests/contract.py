"""The contract of a method, and what its tests are made of."""

from __future__ import annotations

from string import Formatter

import torch

from acam_kd.core import FeatureSpec
from acam_kd.core.distiller import NOTHING_KNOWN


def pyramid(channels):
    return {"p3": FeatureSpec(channels, 8), "p4": FeatureSpec(channels, 16)}


def features(channels, n=2, size=6, grad=False, dtype=torch.float32):
    shapes = {"p3": (n, channels, size, size + 1), "p4": (n, channels, size // 2, 1)}
    return {name: torch.randn(shape, dtype=dtype, requires_grad=grad) for name, shape in shapes.items()}


def check_contract(method, student, teacher, known=NOTHING_KNOWN):
    losses = method(student, teacher, known)
    assert losses and all(key.startswith(f"loss_{type(method).__name__.lower()[:4]}") for key in losses)
    assert all(loss.shape == () and loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    assert [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(f.grad is not None and f.grad.isfinite().all() for f in student.values())
    assert sum(f.grad.abs().sum() for f in student.values()) > 0
    for name, value in method.metrics().items():
        assert value.shape == () and not value.requires_grad, name
        assert name.rpartition("/")[0] in student, name


def fields(text):
    """Return the names in braces of a text."""
    return {field for _, field, _, _ in Formatter().parse(text) if field is not None}
