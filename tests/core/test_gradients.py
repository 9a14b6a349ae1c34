"""The check of gradients: the norm after clipping, and the error for a gradient that is not finite."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from acam_kd.core import clip_gradients
from acam_kd.core.errors import RunError


@pytest.fixture
def model():
    """Seven layers whose biases have gradients of ones; the weights have none."""
    model = nn.Sequential(*(nn.Linear(1, 4) for _ in range(7)))
    for layer in model:
        layer.bias.grad = torch.ones(4)
    return model


@pytest.mark.parametrize(("max_norm", "expected"), [(0.0, 28**0.5), (100.0, 28**0.5), (2.0, 2.0)])
def test_the_norm_of_all_gradients_together_is_clipped(model, max_norm, expected):
    clip_gradients(model, max_norm, when="iteration 7")
    norm = torch.cat([layer.bias.grad for layer in model]).norm()
    assert norm.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_named_and_stays_where_it_is(model, value):
    model[3].bias.grad[1] = value
    with pytest.raises(RunError) as error:
        clip_gradients(model, 2.0, when="iteration 7")
    assert error.value.where == "iteration 7"
    assert error.value.what == "the gradient is not finite in 3.bias"
    assert torch.equal(model[2].bias.grad, torch.ones(4))


def test_of_many_such_gradients_five_are_named(model):
    for layer in model:
        layer.bias.grad[0] = float("nan")
    with pytest.raises(RunError) as error:
        clip_gradients(model, 0.0, when="iteration 0")
    assert error.value.what.endswith("in 0.bias, 1.bias, 2.bias, 3.bias, 4.bias and 2 more")
