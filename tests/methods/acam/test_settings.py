"""Arguments of ACAM-KD: names of its forms, former names, and what is refused."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch

import acam_kd
from acam_kd.core import FeatureSpec
from acam_kd.core.errors import ConfigError
from acam_kd.core.renamed import _warn_once
from acam_kd.methods import ACAMKD

from ...contract import fields, pyramid

LEVEL = {"p3": FeatureSpec(8, 8)}
LITERAL = {"mask_gradient": "full", "diversity": "ratio"}


@pytest.mark.parametrize(
    ("arguments", "title"),
    [
        ({}, "ACAM-KD, ours (mask_gradient=detached, diversity=pairwise)"),
        ({"alpha": 3.0}, "ACAM-KD, ours (mask_gradient=detached, diversity=pairwise)"),
        (LITERAL, "ACAM-KD, literal (mask_gradient=full, diversity=ratio)"),
        ({"mask_gradient": "full"}, "ACAM-KD, mask_gradient=full, diversity=pairwise"),
        ({"diversity": "ratio"}, "ACAM-KD, mask_gradient=detached, diversity=ratio"),
        ({**LITERAL, "query": "student"}, "ACAM-KD, mask_gradient=full, diversity=ratio, query=student"),
        ({"num_masks": 3}, "ACAM-KD, mask_gradient=detached, diversity=pairwise, num_masks=3"),
        ({"num_masks": 6}, "ACAM-KD, ours (mask_gradient=detached, diversity=pairwise)"),
        ({"channel_masking": ""}, "ACAM-KD, mask_gradient=detached, diversity=pairwise, channel_masking=none"),
        ({"standardize_fused": True}, "ACAM-KD, mask_gradient=detached, diversity=pairwise, standardize_fused=True"),
        ({"max_positions": 9}, "ACAM-KD, mask_gradient=detached, diversity=pairwise, max_positions=9"),
        (
            {"spatial_masking": "UniformMasking", "channel_masking": ""},
            "ACAM-KD, mask_gradient=detached, diversity=pairwise, spatial_masking=UniformMasking, channel_masking=none, "
            "fusion=TeacherFusion",
        ),
    ],
)
def test_the_form_that_runs_has_a_name(arguments, title):
    assert ACAMKD(LEVEL, LEVEL, **arguments).title() == title


def test_six_masks_are_not_the_default_on_logits():
    logits = {"logits": FeatureSpec(19, 8, logits=True)}
    assert ACAMKD(logits, logits, num_masks=6).title().endswith("num_masks=6")
    assert "num_masks" not in ACAMKD(logits, logits, num_masks=19).title()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"num_masks": 1}, "a single mask has no overlap; set ACAMKD.num_masks to 2 or more"),
        ({"lambda_div": 0.0}, "ACAMKD.lambda_div is 0; set ACAMKD.lambda_div above 0"),
        ({"num_masks": 1, "mask_gradient": "full"}, ""),
        ({"lambda_div": 0.0, "mask_gradient": "frozen"}, ""),
        ({"lambda_div": 0.0, "mask_gradient": "reversed"}, ""),
        ({"lambda_div": 0.0, "diversity": "decorrelated"}, "ACAMKD.lambda_div is 0"),
        ({"num_masks": 1, "diversity": "decorrelated"}, ""),
        ({"lambda_div": 0.0, "spatial_masking": "UniformMasking", "channel_masking": ""}, ""),
        ({}, ""),
    ],
)
def test_masks_that_nothing_trains_are_reported_when_the_method_is_attached(arguments, reason, caplog):
    """Their parameters get a gradient of zero, so nothing else would show it."""
    nets = [torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2, 1)) for _ in "ab"]
    levels = {"c": "0"}
    acam_kd.distill(*nets, method="ACAMKD", student_levels=levels, teacher_levels=levels, **arguments)
    lines = [text for text in caplog.messages if "nothing trains the masks of c" in text]
    assert len(lines) == bool(reason) and all(reason in line for line in lines)
    if reason:
        nets[0](torch.rand(2, 3, 16, 16))
        sum(nets[0].distillation.losses.values()).backward()
        assert all(not p.grad.any() for p in nets[0].distillation.method.masking.parameters() if p.grad is not None)


def test_a_subclass_is_not_called_by_the_names_of_our_forms():
    assert type("Mine", (ACAMKD,), {})(LEVEL, LEVEL).title() == "Mine"


@pytest.mark.parametrize(("options", "name"), [({}, "ours"), (LITERAL, "literal")])
def test_the_log_says_which_form_is_built(options, name, caplog):
    nets = [torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2, 1)) for _ in "ab"]
    with caplog.at_level(logging.INFO, logger="acam_kd"):
        levels = {"c": "0"}
        acam_kd.distill(*nets, method="ACAMKD", student_levels=levels, teacher_levels=levels, **options)
    assert [text for text in caplog.messages if f"ACAM-KD, {name} (" in text]


def test_former_names_are_read(caplog):
    _warn_once.cache_clear()
    method = ACAMKD(LEVEL, LEVEL, standardize=True, mask_gradient="paper")
    assert method.standardize_fused is True and method.mask_gradient == "full" and method.diversity == "pairwise"
    assert len(caplog.messages) == 2
    assert "ACAMKD.standardize is called ACAMKD.standardize_fused now" in caplog.messages[0]
    assert "ACAMKD.mask_gradient: paper is called full now" in caplog.messages[1]
    with pytest.raises(ConfigError) as error:
        ACAMKD(LEVEL, LEVEL, standardize=True, standardize_fused=False)
    assert error.value.argument == "ACAMKD.standardize_fused" and "ACAMKD.standardize" in error.value.hint


@pytest.mark.parametrize(
    ("arguments", "value", "allowed"),
    [
        ({"max_positions": -1}, "-1", ">= 0"),
        ({"pooling": "values"}, "values", "one of keys, all"),
        ({"alpha": -1.0}, "-1.0", ">= 0 and finite"),
        ({"alpha": float("nan")}, "nan", ">= 0 and finite"),
        ({"lambda_div": -0.1}, "-0.1", ">= 0 and finite"),
        ({"num_masks": -1}, "-1", ">= 0"),
        ({"mask_gradient": "none"}, "none", "one of detached, full, reversed, frozen"),
        ({"diversity": "mean"}, "mean", "one of pairwise, ratio, decorrelated"),
        (
            {"channel_masking": "UniformMasking"},
            "UniformMasking, which makes spatial masks",
            "a masking of channel masks",
        ),
        (
            {"spatial_masking": "ChannelMasking"},
            "ChannelMasking, which makes channel masks",
            "a masking of spatial masks",
        ),
        ({"query": "both", "spatial_masking": "UniformMasking", "channel_masking": ""}, "both", "teacher or student"),
        ({"spatial_masking": "", "channel_masking": ""}, "no masks of either kind", "at least one masking"),
        ({"query": "both"}, "both", "teacher or student"),
    ],
)
def test_bad_arguments_are_named(arguments, value, allowed):
    with pytest.raises(ConfigError) as error:
        ACAMKD(pyramid(8), pyramid(8), **arguments)
    assert error.value.argument == next(iter(arguments))
    assert str(error.value.value) == value and error.value.allowed == allowed
    assert fields(error.value.hint) <= set(inspect.signature(ACAMKD).parameters)


@pytest.mark.parametrize("argument", ["fusion", "spatial_masking", "channel_masking"])
def test_unknown_modules_list_the_known(argument):
    with pytest.raises(ConfigError) as error:
        ACAMKD(pyramid(8), pyramid(8), **{argument: "Nonsense"})
    assert error.value.argument == argument and error.value.value == "Nonsense"
    assert error.value.allowed.startswith("one of ")
