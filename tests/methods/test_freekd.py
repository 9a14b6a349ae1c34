"""FreeKD's second stage: the official figure, the formula, the trained parameters."""

from __future__ import annotations

import pytest
import torch

from acam_kd.core import BACKBONE, FeatureSpec
from acam_kd.core.errors import ConfigError
from acam_kd.methods.freekd import FreeKD, frequency_loss
from acam_kd.methods.parts.tokens import token_masks
from acam_kd.methods.parts.wavelets import haar

LEVEL = {"p3": FeatureSpec(8, 8)}


@pytest.fixture
def maps(official):
    student = official.wave((2, 8, 16, 24), 0.37, 0.1)
    return student, official.wave((2, 8, 16, 24), 0.53, 0.7, 1.5, 0.2)


@pytest.fixture
def method(official):
    built = FreeKD(LEVEL, LEVEL, num_tokens=3)
    with torch.no_grad():
        built.tokens["p3"].tokens.copy_(official.wave((4, 3, 8), 0.31, 0, 0.2))
    return built


def losses(method, student, teacher):
    return method({"p3": student}, {"p3": teacher})


def naive(student, teacher, tokens):
    total = 0.0
    for token in tokens:
        student, s = haar(student)
        teacher, t = haar(teacher)
        masks = token_masks(t.sum(2), token)
        total += (masks[:, :, None, None] * (s - t)[:, None]).abs().mean()
    return total


def test_official_figure(official, maps, method):
    found = losses(method, *maps)
    assert found["loss_freekd_frequency"].item() == pytest.approx(2.1084275, rel=official.rtol)
    torch.testing.assert_close(found["loss_freekd_mse"], 5 * (maps[0] - maps[1]).square().mean())


def test_equal_maps_have_no_error(maps, method):
    assert all(loss == 0 for loss in losses(method, maps[1], maps[1]).values())


@pytest.mark.parametrize("size", [(16, 24), (7, 5)])
def test_loss_is_the_formula_without_its_large_product(size, sizes):
    student, teacher, tokens = torch.randn(2, 4, *size), torch.randn(2, 4, *size), torch.randn(3, 9, 4)
    with sizes:
        found = frequency_loss(student, teacher, tokens)
    torch.testing.assert_close(found, naive(student, teacher, tokens))
    assert max(sizes.seen) <= 2 * 4 * (size[0] + 1) * (size[1] + 1)


def test_the_low_pass_counts_in_the_plain_error_alone(maps, method):
    """A constant per 8 x 8 block is low pass only."""
    blocks = torch.randn(2, 8, 2, 3).repeat_interleave(8, 2).repeat_interleave(8, 3)
    moved = losses(method, maps[1] + blocks, maps[1])
    assert moved["loss_freekd_frequency"].item() == pytest.approx(0, abs=1e-5) and moved["loss_freekd_mse"] > 1


def test_only_the_alignment_is_trained(maps, method):
    assert {n for n, p in method.named_parameters() if p.requires_grad} == {"align.p3.weight", "align.p3.bias"}
    student, teacher = (x.clone().requires_grad_() for x in maps)
    losses(method, student, teacher)["loss_freekd_frequency"].backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    assert all(p.grad is None for p in method.tokens.parameters())
    assert method.align["p3"].weight.grad.abs().sum() > 0


def test_masks_are_the_teachers_alone(maps, method):
    """The loss is convex in the student, as a weighted L1 distance is."""
    middle = losses(method, (maps[0] + maps[1]) / 2, maps[1])["loss_freekd_frequency"]
    torch.testing.assert_close(2 * middle, losses(method, *maps)["loss_freekd_frequency"])


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (1, 8, 5, 3), (1, 8, 1, 1)])
def test_small_and_empty_batches_under_autocast(shape):
    student = torch.randn(shape, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = losses(FreeKD(LEVEL, LEVEL), student, torch.randn(shape))
    assert all(x.shape == () and x.dtype == torch.float32 and x.isfinite() for x in found.values())
    sum(found.values()).backward()
    assert student.grad is not None and all((x == 0) == (shape[0] == 0) for x in found.values())


def test_weights_and_metrics(maps, method):
    first = losses(method, *maps)
    other = FreeKD(LEVEL, LEVEL, num_tokens=3, alpha=2.0, lambda_mse=0.5)
    other.load_state_dict(method.state_dict())
    second = losses(other, *maps)
    torch.testing.assert_close(second["loss_freekd_frequency"], 2 * first["loss_freekd_frequency"])
    torch.testing.assert_close(second["loss_freekd_mse"], first["loss_freekd_mse"] / 10)
    assert other.metrics()["p3/frequency"] == first["loss_freekd_frequency"]
    torch.testing.assert_close(5 * other.metrics()["p3/mse"], first["loss_freekd_mse"].detach())


def test_it_reads_backbones_only_and_reports_untrained_prompts():
    assert FreeKD.reads == (BACKBONE,)
    (text,) = FreeKD(LEVEL, LEVEL).warnings().values()
    assert "untrained" in text and "acam_kd.learn_tokens" in text and "set {tokens} to the file" in text


@pytest.mark.parametrize(("argument", "value"), [("alpha", -1.0), ("lambda_mse", float("nan")), ("num_tokens", -2)])
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ConfigError) as error:
        FreeKD(LEVEL, LEVEL, **{argument: value})
    assert error.value.argument == argument and error.value.value is value
