"""DMKD: the identities of the reconstruction, counts of hidden positions, gradients, faults."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from acam_kd.core import FeatureSpec
from acam_kd.core.errors import ConfigError
from acam_kd.methods.dmkd import DMKD, hide_largest
from acam_kd.methods.parts.attention import attention_of

P3 = {"p3": FeatureSpec(8, 8)}
KEY = "loss_dmkd_generation"


def loss_of(method, student, teacher):
    return method({"p3": student}, {"p3": teacher})[KEY]


def without_generators(**arguments):
    method = DMKD(P3, P3, **arguments)
    method.generate_s["p3"], method.generate_c["p3"] = nn.Identity(), nn.Identity()
    return method


def test_nothing_hidden_and_nothing_generated_is_the_squared_error(official):
    method = without_generators(alpha=3.0, rho_s=0.0, rho_c=0.0)
    expected = 3 * (official.student - official.teacher).square().sum() / 2
    torch.testing.assert_close(loss_of(method, official.student, official.teacher), expected)
    assert method.metrics()["p3/mse"].item() == pytest.approx(1.6679301, rel=official.rtol)


def test_the_formula_with_masks(official):
    """Hidden by a sort of the attention here, and the branches weighed 1 : 4."""
    method = without_generators(alpha=1.0, rho_s=0.3, rho_c=0.5)
    with torch.no_grad():
        method.balance["p3"].copy_(torch.tensor([0.0, 3.0]).log1p())  # the logarithms of 1 and 4
    spatial, channel = torch.ones(2, 60), torch.ones(2, 8)
    for n in range(2):
        spatial[n, attention_of(official.teacher, 0.5).spatial[n].flatten().argsort()[-18:]] = 0
        channel[n, attention_of(official.teacher, 0.5).channel[n].argsort()[-4:]] = 0
    rebuilt = official.student * (0.2 * spatial.view(2, 1, 6, 10) + 0.8 * channel.view(2, 8, 1, 1))
    expected = (rebuilt - official.teacher).square().sum() / 2
    torch.testing.assert_close(loss_of(method, official.student, official.teacher), expected)
    masks = method.masks()["p3"]
    assert torch.equal(masks["spatial"], spatial.view(2, 1, 6, 10)) and torch.equal(masks["channel"][:, 0], channel)
    assert method.metrics()["p3/spatial_weight"].item() == pytest.approx(0.2)


@pytest.mark.parametrize("fraction", [0.0, 0.15, 0.45, 0.5, 0.65, 0.99, 1.0])
@pytest.mark.parametrize("count", [1, 7, 60])
def test_as_many_are_hidden_as_asked_for_also_among_equals(fraction, count):
    for attention in (torch.randn(3, count), torch.ones(3, count)):
        hidden = (hide_largest(attention, fraction) == 0).sum(1)
        assert hidden.tolist() == [math.floor(fraction * count)] * 3


@pytest.mark.parametrize(
    ("fraction", "count", "hidden"), [(0.29, 100, 29), (0.57, 100, 57), (0.65, 60, 39), (0.15, 7, 1)]
)
def test_a_fraction_is_of_decimals(fraction, count, hidden):
    """In binary 0.29 * 100 is below 29."""
    assert (hide_largest(torch.randn(1, count), fraction) == 0).sum() == hidden


def test_the_largest_are_hidden():
    attention = torch.tensor([[0.1, 3.0, 0.2, 2.0], [5.0, 1.0, 0.0, 4.0]])
    assert hide_largest(attention, 0.5).tolist() == [[1, 0, 1, 0], [0, 1, 1, 0]]


def test_the_masks_are_the_teachers_alone(official):
    method = DMKD(P3, P3)
    loss_of(method, official.student, official.teacher)
    first = method.masks()["p3"]
    loss_of(method, 1 - 3 * official.student, official.teacher)
    second = method.masks()["p3"]
    assert all(torch.equal(first[kind], second[kind]) for kind in ("spatial", "channel"))
    loss_of(method, official.student, official.student)
    assert not torch.equal(first["spatial"], method.masks()["p3"]["spatial"])


def test_the_branches_start_equal_and_have_generators_of_their_own(official):
    method = DMKD(P3, P3)
    loss_of(method, official.student, official.teacher)
    assert method.metrics()["p3/spatial_weight"] == 0.5
    assert not torch.equal(*(g["p3"][0].weight for g in (method.generate_s, method.generate_c)))


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("channels", [(8, 8), (8, 3), (3, 1)])
def test_everything_is_trained_and_the_teacher_is_not(n, channels):
    levels = [{"p3": FeatureSpec(c, 8)} for c in channels]
    student, teacher = (torch.randn(n, c, 7, 5, requires_grad=True) for c in channels)
    method = DMKD(*levels)
    loss = loss_of(method, student, teacher)
    loss.backward()
    assert loss.shape == () and loss.isfinite()
    assert [name for name, p in method.named_parameters() if p.grad is None] == []
    assert n == 0 or method.balance["p3"].grad.abs().sum() > 0
    assert teacher.grad is None and student.grad.isfinite().all() and (n == 0 or student.grad.abs().sum() > 0)


def test_autocast_sums_in_float32(official):
    method = DMKD(P3, P3)
    full = loss_of(method, official.student, official.teacher)
    masks = method.masks()["p3"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = loss_of(method, official.student, official.teacher)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.01, atol=0)
    assert torch.equal(method.masks()["p3"]["spatial"], masks["spatial"])


def test_it_says_what_it_is():
    assert "RECONSTRUCTION from the abstract" in " ".join(DMKD.__doc__.split())


@pytest.mark.parametrize(("argument", "value"), [("alpha", -1.0), ("rho_s", 1.5), ("rho_c", -0.1)])
def test_faults_are_named(argument, value):
    with pytest.raises(ConfigError) as error:
        DMKD(P3, P3, **{argument: value})
    assert error.value.argument == argument and error.value.value == value
    assert error.value.allowed == (">= 0 and finite" if argument == "alpha" else "between 0 and 1")
