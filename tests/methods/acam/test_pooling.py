"""Pooling before the fusion: of the key/value source alone, or of all."""

from __future__ import annotations

import pytest
import torch

from acam_kd.core import FeatureSpec
from acam_kd.core.errors import ConfigError
from acam_kd.methods import ACAMKD
from acam_kd.methods.acam.settings import pooling_factor

from ...contract import features, fields, pyramid


@pytest.mark.parametrize(("query", "pooled"), [("teacher", "student"), ("student", "teacher")])
def test_pooled_keys_are_those_of_the_key_value_source(query, pooled):
    """Of 6 x 7 positions, at most 20: 3 x 4 means of 2 x 2, or of fewer at the border; masks keep their size."""
    level = {"p3": FeatureSpec(8, 8)}
    method = ACAMKD(level, level, max_positions=20, query=query)
    maps = {"student": torch.randn(2, 8, 6, 7), "teacher": torch.randn(2, 8, 6, 7)}
    method(*({"p3": x} for x in maps.values()))
    means = torch.nn.functional.interpolate(maps[pooled][..., :6], (3, 3), mode="area")
    means = torch.cat([means, maps[pooled][..., 6:].unflatten(2, (3, 2)).mean(3)], 3)
    fused = method.fusion["p3"](**{**maps, pooled: means})
    expected = {kind: masking["p3"](fused) for kind, masking in method.masking.items()}
    torch.testing.assert_close(method.masks()["p3"], expected)


@pytest.mark.parametrize("width", [8, 7])
def test_with_all_pooled_the_masks_are_scaled_up(width):
    """Each mean of 2 x 2 covers its own four positions, also where the border cuts it."""
    level = {"p3": FeatureSpec(8, 8)}
    method, small = ACAMKD(level, level, max_positions=12, pooling="all"), ACAMKD(level, level)
    small.load_state_dict(method.state_dict())
    student, teacher = torch.randn(2, 8, 6, width), torch.randn(2, 8, 6, width)
    method({"p3": student}, {"p3": teacher})
    small(*({"p3": torch.nn.functional.avg_pool2d(x, 2, ceil_mode=True)} for x in (student, teacher)))
    masks, expected = method.masks()["p3"], small.masks()["p3"]
    torch.testing.assert_close(masks["channel"], expected["channel"])
    scaled = torch.nn.functional.interpolate(expected["spatial"], (6, 8), mode="bilinear")
    torch.testing.assert_close(masks["spatial"], scaled[..., :width])


def test_levels_within_the_limit_are_not_pooled():
    limited, plain = ACAMKD(pyramid(8), pyramid(8), max_positions=42), ACAMKD(pyramid(8), pyramid(8))
    limited.load_state_dict(plain.state_dict())
    student, teacher = features(8), features(8)
    assert limited(student, teacher) == plain(student, teacher)
    limited.max_positions = 41
    limited(student, teacher)
    assert not torch.equal(limited.masks()["p3"]["spatial"], plain.masks()["p3"]["spatial"])
    assert torch.equal(limited.masks()["p4"]["spatial"], plain.masks()["p4"]["spatial"])


@pytest.mark.parametrize(
    ("size", "limit", "factor"), [((6, 7), 0, 0), ((6, 7), 42, 0), ((6, 7), 41, 2), ((6, 7), 11, 3), ((1, 50), 7, 8)]
)
def test_the_smallest_whole_factor_that_will_do(size, limit, factor):
    assert pooling_factor(*size, limit) == factor


def test_only_attention_is_made_cheaper_by_pooling():
    with pytest.raises(ConfigError) as error:
        ACAMKD(pyramid(8), pyramid(8), fusion="TeacherFusion", max_positions=9)
    assert error.value.argument == "max_positions" and error.value.value == 9
    assert error.value.allowed.startswith("0 for TeacherFusion, which has no attention")
    assert fields(error.value.hint) == {"max_positions", "fusion"}
