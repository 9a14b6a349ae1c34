"""Mimicking on raw and on standardised features."""

from __future__ import annotations

import pytest
import torch

from acam_kd.core import ConfigError
from acam_kd.methods import ACAMKD, Mimic
from acam_kd.methods.parts.losses import mse
from acam_kd.methods.parts.masked import mean_squared_errors
from acam_kd.methods.parts.standardized import standardized
from acam_kd.methods.pkd import pearson_errors

LEVEL = {"p3": 4}


def maps():
    torch.manual_seed(3)
    return [{"p3": torch.randn(2, 4, 5, 6, dtype=torch.float64) * 3 + 1} for _ in range(2)]


def test_standardised_channels_have_mean_zero_and_deviation_one():
    (x,) = standardized([maps()[0]["p3"]])
    assert x.mean((0, 2, 3)).abs().max() < 1e-12 and x.std((0, 2, 3)).sub(1).abs().max() < 1e-6
    for small in (torch.ones(2, 3, 4, 4), torch.randn(1, 3, 1, 1), torch.zeros(0, 3, 4, 4)):
        assert standardized([small])[0].isfinite().all()
    assert not standardized([torch.randn(1, 3, 1, 1)])[0].any()
    (half,) = standardized([torch.randn(2, 3, 4, 4).half()])
    assert half.dtype == torch.float32


def test_channels_stay_last_in_memory():
    x, y = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(2, 3, 4, 5)
    for found, given in zip(standardized([x, 2 * x]) + standardized([y]), (x, x, y)):
        assert found.stride() == given.stride()
    torch.testing.assert_close(standardized([x])[0], standardized([x.contiguous()])[0])


def defined(x, small=1e-6):
    several = x.numel() > x.shape[1]
    deviation, mean = torch.std_mean(x, (0, 2, 3), correction=int(several), keepdim=True)
    return (x - mean) / (deviation + small)


def test_the_gradient_of_several_standardised_maps_is_that_of_the_definition():
    torch.manual_seed(0)
    shapes = [(2, 3, 4, 5), (2, 3, 1, 2), (2, 5, 3, 3), (1, 3, 1, 1), (2, 5, 3, 3), (2, 3, 4, 5)]
    maps = [torch.randn(shape, dtype=torch.float64) * 2 + 1 for shape in shapes]
    maps[0][:, 1] = 4  # a constant channel
    inputs = [x.clone().requires_grad_(i != 2) for i, x in enumerate(maps)]
    weights = [torch.randn_like(x) for x in maps]
    found = standardized(inputs)
    assert [y.requires_grad for y in found] == [i != 2 for i in range(6)]  # nothing is computed for a teacher's map
    sum((w * y).sum() for w, y in zip(weights, found)).backward()
    for i, (x, w, given) in enumerate(zip(maps, weights, inputs)):
        expected = x.clone().requires_grad_()
        (w * defined(expected)).sum().backward()
        assert (given.grad is None) == (i == 2)
        if i != 2:
            alive = [c for c in range(x.shape[1]) if (i, c) != (0, 1)]
            torch.testing.assert_close(given.grad[:, alive], expected.grad[:, alive], rtol=1e-9, atol=1e-9)
    constant, w = inputs[0].grad[:, 1], weights[0][:, 1]
    torch.testing.assert_close(constant, (w - w.mean()) / 1e-6)  # the derivative of (x - mean) / 1e-6
    lively = [x[:, [0, 2]].requires_grad_() for x in maps[:2]]
    assert torch.autograd.gradcheck(lambda *x: tuple(standardized(x)), lively)


def test_the_errors_of_all_levels_are_those_of_each():
    torch.manual_seed(0)
    shapes = [(2, 3, 4, 5), (2, 3, 1, 2), (0, 3, 2, 2)]
    student = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    teacher = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    errors, expected = mean_squared_errors(student, teacher), torch.stack([*map(mse, student, teacher)])
    torch.testing.assert_close(errors, expected)
    weights = torch.tensor([1.0, -2, 3], dtype=torch.float64)
    for own, theirs in zip(*(torch.autograd.grad((x * weights).sum(), student) for x in (errors, expected))):
        torch.testing.assert_close(own, theirs)
    half = mean_squared_errors([x.detach().bfloat16().requires_grad_() for x in student], teacher)
    assert half.dtype == torch.float64  # the common type
    with pytest.raises(ValueError, match="differ in shape"):
        mean_squared_errors(student, teacher[::-1])


def test_mimicking_standardised_features_is_twice_the_loss_of_pkd():
    student, teacher = maps()
    method = Mimic(LEVEL, LEVEL, features="standardized").double()
    loss = method(student, teacher)["loss_mimic_mse"]
    assert loss.item() == pytest.approx(2 * pearson_errors([student["p3"]], [teacher["p3"]]).item(), rel=1e-9)


@pytest.mark.parametrize("method", [Mimic, ACAMKD])
def test_standardised_losses_do_not_know_the_scale(method):
    student, teacher = maps()
    scaled = {"p3": 1000 * teacher["p3"] - 7}
    built = method(LEVEL, LEVEL, features="standardized").double()
    here, there = (sum(built(student, x).values()).item() for x in (teacher, scaled))
    assert here == pytest.approx(there, rel=1e-6)
    raw = method(LEVEL, LEVEL).double()
    assert sum(raw(student, scaled).values()) > 1e3 * sum(raw(student, teacher).values())


def test_unknown_features_are_refused():
    for method in (Mimic, ACAMKD):
        with pytest.raises(ConfigError) as error:
            method(LEVEL, LEVEL, features="soft")
        assert (error.value.argument, error.value.allowed) == ("features", "one of raw, standardized")
