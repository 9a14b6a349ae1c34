"""SAMKD: what it becomes with one resolution and with equal weights, its masks and weights, gradients, faults."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from acam_kd.core import FeatureSpec
from acam_kd.core.errors import ConfigError
from acam_kd.methods.dmkd import DMKD
from acam_kd.methods.kd import binary_kd_loss
from acam_kd.methods.parts.attention import attention_of
from acam_kd.methods.samkd import SAMKD, difference_weights, hide_cells

from ..contract import check_contract

CLASSES = FeatureSpec(5, 0, logits=True, sigmoid=True)


def levels(channels=8):
    return {"p3": FeatureSpec(channels, 8), "p4": FeatureSpec(channels, 16), "classes": CLASSES}


def maps(channels=8, n=2, grad=False, anchors=1):
    shapes = {"p3": (channels, 6, 10), "p4": (channels, 3, 5), "classes": (5, 75 * anchors, 1)}
    return {level: torch.randn(n, *shape, requires_grad=grad) for level, shape in shapes.items()}


def test_with_one_resolution_the_features_are_dmkds():
    torch.manual_seed(0)
    student, teacher = maps(), maps(12)
    both = {level: levels()[level] for level in ("p3", "p4")}, {level: levels(12)[level] for level in ("p3", "p4")}
    dmkd, method = DMKD(*both, alpha=0.1), SAMKD(levels(), levels(12), alpha=0.1, resolutions=1)
    method.load_state_dict(dmkd.state_dict())  # the same parameters under the same names
    found = method(student, teacher)["loss_samkd_features"]
    torch.testing.assert_close(found, dmkd(student, teacher)["loss_dmkd_generation"], rtol=0, atol=0)
    several = SAMKD(levels(), levels(12), alpha=0.1)
    several.load_state_dict(dmkd.state_dict())
    assert several(student, teacher)["loss_samkd_features"] != found


@pytest.mark.parametrize("anchors", [1, 3])
def test_with_equal_weights_the_logits_are_kds(anchors):
    """Features that differ everywhere by the same: all weights are 1."""
    teacher = maps(anchors=anchors)
    student = {level: x + 1 for level, x in teacher.items()}
    student["classes"] = torch.randn_like(teacher["classes"])
    method = SAMKD(levels(), levels(), beta=2.0, temperature=3.0)
    found = method(student, teacher)["loss_samkd_logits"]
    torch.testing.assert_close(found, 2 * binary_kd_loss(student["classes"], teacher["classes"], 3.0))
    torch.testing.assert_close(method(teacher, teacher)["loss_samkd_logits"], torch.tensor(0.0))


def test_the_weight_of_an_anchor_is_that_of_its_position():
    """All features differ at one position of p4 only, whose two anchors carry the whole loss of that level."""
    teacher = maps(n=1, anchors=2)
    student = {level: x.clone() for level, x in teacher.items()}
    student["p4"][0, :, 1, 2] += 4
    student["classes"] = teacher["classes"] + torch.randn_like(teacher["classes"])
    weights = torch.ones(1, 150)  # p3 has no difference: all its weights are 1
    weights[0, 120:] = 0
    place = 120 + 2 * (1 * 5 + 2)
    weights[0, place : place + 2] = 15
    found = SAMKD(levels(), levels())(student, teacher)["loss_samkd_logits"]
    expected = binary_kd_loss(student["classes"], teacher["classes"], 1.0, weights[..., None])
    torch.testing.assert_close(found, expected)


def test_weights_have_mean_one_in_every_image():
    student, teacher = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    student[1] = teacher[1]
    weights = difference_weights(student, teacher)
    torch.testing.assert_close(weights.mean((1, 2)), torch.ones(3))
    assert torch.equal(weights[1], torch.ones(5, 6)) and weights[0].std() > 0.1
    torch.testing.assert_close(weights[0], ((student - teacher)[0] ** 2).mean(0) / ((student - teacher)[0] ** 2).mean())


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (7, 5), (1, 1)])
@pytest.mark.parametrize("cell", [1, 2, 4, 16])
def test_whole_cells_are_hidden_and_as_many_as_asked_for(size, cell):
    attention = torch.rand(2, *size)
    kept = hide_cells(attention, 0.5, cell)
    assert kept.shape == (2, 1, *size) and set(kept.unique().tolist()) <= {0.0, 1.0}
    rows, columns = (math.ceil(side / cell) for side in size)
    hidden = 0
    for row in range(rows):
        for column in range(columns):
            block = kept[0, 0, row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
            assert block.unique().numel() == 1
            hidden += int(block[0, 0] == 0)
    assert hidden == math.floor(0.5 * rows * columns)


def test_the_cells_with_the_largest_mean_are_hidden():
    attention = torch.tensor([[[1.0, 1, 0, 9], [1, 1, 0, 0], [5, 5, 2, 2]]])
    assert hide_cells(attention, 0.25, 2)[0, 0].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]]  # a half cell
    assert hide_cells(attention, 0.5, 2)[0, 0].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]]


def test_masks_go_from_coarse_to_fine_and_are_the_teachers(official):
    method = SAMKD(levels(), levels(), rho_s=0.5)
    teacher = maps()
    method(maps(), teacher)
    found = method.masks()["p3"]["spatial"]
    attention = attention_of(teacher["p3"], 0.5).spatial
    assert torch.equal(found, torch.cat([hide_cells(attention, 0.5, cell) for cell in (4, 2, 1)], 1))
    method(maps(), teacher)
    assert torch.equal(found, method.masks()["p3"]["spatial"])


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("channels", [(8, 8), (8, 3), (3, 8)])
def test_the_contract(n, channels):
    method = SAMKD(levels(channels[0]), levels(channels[1]))
    check_contract(method, maps(channels[0], n, grad=True), maps(channels[1], n))


def test_an_empty_batch_is_zero():
    losses = SAMKD(levels(), levels())(maps(n=0, grad=True), maps(n=0))
    assert all(loss.item() == 0 and loss.requires_grad for loss in losses.values())


def test_under_autocast():
    torch.manual_seed(0)
    method, student, teacher = SAMKD(levels(), levels()), maps(), maps()
    full = method(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = method(student, teacher)
    for key, loss in half.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, full[key], rtol=0.02, atol=0)


def test_no_gradient_reaches_the_teacher_or_the_weights():
    """Of the logits' loss the student's maps get none."""
    student, teacher = maps(grad=True), maps(grad=True)
    SAMKD(levels(), levels())(student, teacher)["loss_samkd_logits"].backward()
    assert student["classes"].grad is not None and student["p3"].grad is None
    assert all(x.grad is None for x in teacher.values())


def test_it_says_what_it_is():
    text = " ".join(SAMKD.__doc__.split())
    assert "RECONSTRUCTION" in text and all(f"({source}" in text for source in ("abstract", "note", "ours"))


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("alpha", -1.0, ">= 0 and finite"),
        ("beta", math.nan, ">= 0 and finite"),
        ("rho_s", 1.5, "between 0 and 1"),
        ("rho_c", -0.1, "between 0 and 1"),
        ("temperature", 0.0, "> 0 and finite"),
        ("resolutions", 0, "a whole number from 1 to 5"),
        ("resolutions", 6, "a whole number from 1 to 5"),
    ],
)
def test_faults_are_named(argument, value, allowed):
    with pytest.raises(ConfigError) as error:
        SAMKD(levels(), levels(), **{argument: value})
    assert (error.value.argument, error.value.allowed) == (argument, allowed)


@pytest.mark.parametrize("left_out", [("classes",), ("p3", "p4")])
def test_maps_and_classes_are_needed(left_out):
    pyramid = {level: spec for level, spec in levels().items() if level not in left_out}
    with pytest.raises(ConfigError) as error:
        SAMKD(pyramid, pyramid)
    assert error.value.argument == "levels" and "the classes of a dense head" in error.value.allowed
    softmax = {**levels(), "classes": FeatureSpec(5, 0, logits=True)}
    with pytest.raises(ConfigError):
        SAMKD(softmax, softmax)


def test_a_level_that_the_head_sees_and_the_method_does_not():
    pyramid = {level: spec for level, spec in levels().items() if level != "p3"}
    with pytest.raises(ConfigError) as error:
        SAMKD(pyramid, pyramid)(maps(anchors=1) | {"classes": torch.randn(2, 5, 76, 1)}, maps())
    assert error.value.value == "15 positions and 76 anchors of classes"


def test_it_is_registered_for_dense_heads():
    assert set(SAMKD.recipes) | {""} == set(SAMKD.families)
    assert isinstance(SAMKD(levels(), levels()).generate_s["p3"], nn.Sequential)
