"""MasKD's second stage: the official figures, the formula, the custom mask, the trained parameters."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from acam_kd.core import FeatureSpec
from acam_kd.core.errors import ConfigError
from acam_kd.methods.maskd import FEATURES_EPS, MasKD
from acam_kd.methods.parts.losses import spatial_masked_mse

masked_error = partial(spatial_masked_mse, eps=FEATURES_EPS)


LEVEL = {"p3": FeatureSpec(8, 8)}
LOGIT_MAP = {"logits": FeatureSpec(8, 8, logits=True)}
LATER = 10**6


def filled(official, level=LEVEL, num_tokens=3, **arguments):
    method = MasKD(level, level, num_tokens=num_tokens, **arguments)
    for tokens in method.tokens.values():
        official.fill(tokens.parameters(), 0.2)
    return method


def loss(method, student, teacher):
    (name,) = method.levels
    return method({name: student}, {name: teacher})["loss_maskd_feature"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"custom_mask_warmup": LATER}, 0.97416914),
        ({"custom_mask_warmup": 0}, 0.48723441),
        ({"custom_mask_warmup": LATER, "weight_mask": False}, 0.9605782),
        ({"level": LOGIT_MAP, "num_tokens": 4}, 0.49978435),
    ],
)
def test_official_figures(official, arguments, expected):
    found = loss(filled(official, **arguments), official.student, official.teacher)
    assert found.item() == pytest.approx(expected, rel=official.rtol)


def naive(student, teacher, masks, p):
    total = 0.0
    for n in range(len(student)):
        for t in range(masks.shape[1]):
            m = masks[n, t]
            per_channel = ((m * student[n] - m * teacher[n]) ** 2).sum((1, 2)) / m.sum()
            total += p[n, t] * per_channel.mean()
    return total / len(student)


def test_loss_is_the_formula_without_its_large_product(sizes):
    student, teacher, masks = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5, 7), torch.rand(2, 40, 5, 7)
    p = torch.rand(2, 40).softmax(1)
    with sizes:
        found = masked_error(student, teacher, masks, p)
    torch.testing.assert_close(found, naive(student, teacher, masks, p))
    assert max(sizes.seen) == masks.numel()
    torch.testing.assert_close(
        masked_error(student, teacher, masks), naive(student, teacher, masks, torch.full((2, 40), 1 / 40))
    )


def test_equal_maps_have_no_error(official):
    for level in (LEVEL, LOGIT_MAP):
        assert loss(filled(official, level), official.teacher, official.teacher) == 0


def test_masks_of_the_student_come_in_after_the_warm_up(official):
    method = filled(official, custom_mask_warmup=2)
    found = [loss(method, official.student, official.teacher).item() for _ in range(2)]
    method.eval()
    found.append(loss(method, official.student, official.teacher).item())
    later = filled(official, custom_mask_warmup=2)
    later.load_state_dict(method.state_dict())  # a resumed run
    assert later.steps == 2
    found.append(loss(later, official.student, official.teacher).item())
    assert found == pytest.approx([0.97416914] * 2 + [0.48723441] * 2, rel=official.rtol)


def test_evaluation_does_not_count(official):
    method = filled(official).eval()
    loss(method, official.student, official.teacher)
    assert method.steps == 0


def test_custom_masks_are_constants(official):
    """No gradient through the student's mask: the loss is the formula's, with the mask held fixed."""
    method = filled(official, custom_mask_warmup=0)
    student = official.student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(method, student, official.teacher), student)
    tokens = method.tokens["p3"]
    masks = (tokens(official.teacher) * tokens(official.student)).detach()
    held = masked_error(student, official.teacher, masks, tokens.weights(official.teacher))
    torch.testing.assert_close(gradient, torch.autograd.grad(held, student)[0])


def test_only_the_alignment_is_trained(official):
    method = MasKD(LEVEL, LEVEL)
    assert {n for n, p in method.named_parameters() if p.requires_grad} == {"align.p3.weight", "align.p3.bias"}
    assert not list(MasKD(LOGIT_MAP, LOGIT_MAP).align.parameters())
    teacher = official.teacher.clone().requires_grad_()
    loss(method, official.student, teacher).backward()
    assert teacher.grad is None and all(p.grad is None for p in method.tokens.parameters())
    assert method.align["p3"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("level", [LEVEL, LOGIT_MAP])
@pytest.mark.parametrize("n", [0, 1])
def test_small_and_empty_batches_under_autocast(level, n):
    student = torch.randn(n, 8, 5, 3, requires_grad=True)
    method = MasKD(level, level)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(method, student, torch.randn(n, 8, 5, 3))
    assert found.shape == () and found.dtype == torch.float32 and found.isfinite() and found >= 0
    found.backward()
    assert student.grad is not None and (found == 0) == (n == 0)
    assert set(method.metrics()) == (
        {f"{m}/{k}" for m in level for k in ("mask_mean", "dice", "error")} if n else set()
    )


def test_weights_levels_metrics_and_masks(official):
    two = {"p3": LEVEL["p3"], "p4": FeatureSpec(8, 16)}
    method = filled(official, two, alpha=7.0, custom_mask_warmup=LATER)
    maps = [dict.fromkeys(two, x) for x in (official.student, official.teacher)]
    found = method(*maps)["loss_maskd_feature"]
    assert found.item() == pytest.approx(7 * 2 * 0.97416914, rel=official.rtol)
    metrics = method.metrics()
    assert metrics["p3/dice"].item() == pytest.approx(0.82159585, rel=official.rtol)
    assert metrics["p4/error"].item() == pytest.approx(0.97416914, rel=official.rtol)
    assert 0 < metrics["p3/mask_mean"] < 1
    assert method.masks()["p4"]["spatial"].shape == (2, 3, 6, 10)


def test_untrained_tokens_are_reported_once():
    (text,) = MasKD(LEVEL, LEVEL).warnings().values()
    assert "untrained" in text and "acam_kd.learn_tokens" in text and "set {tokens} to the file" in text


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [("alpha", -1.0, ">= 0 and finite"), ("num_tokens", -2, ">= 0"), ("custom_mask_warmup", -1, ">= 0")],
)
def test_bad_arguments_are_named(argument, value, allowed):
    with pytest.raises(ConfigError) as error:
        MasKD(LEVEL, LEVEL, **{argument: value})
    assert (error.value.argument, error.value.value, error.value.allowed) == (argument, value, allowed)


def test_maps_that_differ_in_shape_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        loss(MasKD(LOGIT_MAP, LOGIT_MAP), torch.zeros(1, 8, 2, 2), torch.zeros(1, 8, 2, 3))
