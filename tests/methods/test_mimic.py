"""Mimicking on raw and on standardised features."""

from __future__ import annotations

import pytest
import torch

from acam_kd.core import ConfigError
from acam_kd.methods import ACAMKD, Mimic
from acam_kd.methods.parts.losses import standardized
from acam_kd.methods.pkd import pearson_error

LEVEL = {"p3": 4}


def maps():
    torch.manual_seed(3)
    return [{"p3": torch.randn(2, 4, 5, 6, dtype=torch.float64) * 3 + 1} for _ in range(2)]


def test_standardised_channels_have_mean_zero_and_deviation_one():
    x = standardized(maps()[0]["p3"])
    assert x.mean((0, 2, 3)).abs().max() < 1e-12 and x.std((0, 2, 3)).sub(1).abs().max() < 1e-6
    for small in (torch.ones(2, 3, 4, 4), torch.randn(1, 3, 1, 1), torch.zeros(0, 3, 4, 4)):
        assert standardized(small).isfinite().all()
    assert not standardized(torch.randn(1, 3, 1, 1)).any()
    half = standardized(torch.randn(2, 3, 4, 4).half())
    assert half.dtype == torch.float32


def test_mimicking_standardised_features_is_twice_the_loss_of_pkd():
    student, teacher = maps()
    method = Mimic(LEVEL, LEVEL, features="standardized").double()
    loss = method(student, teacher)["loss_mimic_mse"]
    assert loss.item() == pytest.approx(2 * pearson_error(student["p3"], teacher["p3"]).item(), rel=1e-9)


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
