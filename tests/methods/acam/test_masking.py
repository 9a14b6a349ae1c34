"""Masks from the fused map: formula, shapes, ranges, starting point, faults."""

from __future__ import annotations

import pytest
import torch

from acam_kd.core import MASKING_REGISTRY
from acam_kd.core.errors import ConfigError
from acam_kd.methods.acam.masking import ChannelMasking, SpatialMasking, UniformMasking


def test_spatial_masks_are_the_sigmoid_of_unit_times_position():
    masking = SpatialMasking(5, num_masks=3)
    fused = torch.randn(2, 5, 4, 6)
    masks = masking(fused)
    assert masking.units.shape == (3, 5) and masks.shape == (2, 3, 4, 6)
    expected = torch.sigmoid((masking.units[1] * fused[0, :, 2, 3]).sum())
    torch.testing.assert_close(masks[0, 1, 2, 3], expected)


def test_channel_masks_are_the_sigmoid_of_unit_times_mean():
    masking = ChannelMasking(num_masks=3)
    fused = torch.randn(2, 5, 4, 6)
    masks = masking(fused)
    assert masking.units.shape == (3, 1) and masks.shape == (2, 3, 5)
    torch.testing.assert_close(masks[1, 2, 4], torch.sigmoid(masking.units[2, 0] * fused[1, 4].mean()))
    logits = masks.logit()[0]
    torch.testing.assert_close(logits[0] / masking.units[0], logits[1] / masking.units[1], rtol=1e-3, atol=1e-4)


def test_channel_masks_do_not_see_the_order_of_positions():
    masking = ChannelMasking(num_masks=2)
    fused = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(masking(fused), masking(fused.flip(2)))


def test_units_start_small_so_that_masks_start_at_one_half():
    units = SpatialMasking(256, num_masks=100).units
    assert units.mean().abs() < 1e-3 and abs(units.std() - 0.01) < 1e-3


def test_uniform_masks_are_one_and_learn_nothing():
    masking = UniformMasking(5, num_masks=3)
    assert torch.equal(masking(torch.randn(2, 5, 4, 6)), torch.ones(2, 3, 4, 6))
    assert not list(masking.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda m: SpatialMasking(4, num_masks=m),
        lambda m: ChannelMasking(num_masks=m),
        lambda m: UniformMasking(4, num_masks=m),
    ],
)
def test_no_masks_is_an_error(make):
    with pytest.raises(ConfigError) as error:
        make(0)
    assert (error.value.argument, error.value.value, error.value.allowed) == ("num_masks", 0, ">= 1")


def test_unknown_masking_lists_the_known():
    for argument in ("masking", "channel_masking"):
        with pytest.raises(ConfigError) as error:
            MASKING_REGISTRY.get("Spatial", argument="" if argument == "masking" else argument)
        assert error.value.argument == argument and error.value.value == "Spatial"
        assert error.value.allowed == "one of ChannelMasking, SpatialMasking, UniformMasking"
