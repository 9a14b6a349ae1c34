"""CWD: the official figures, invariants, values by hand, faults."""

from __future__ import annotations

import pytest
import torch

from acam_kd.core import FeatureSpec
from acam_kd.core.errors import ConfigError
from acam_kd.methods.cwd import CWD, channel_wise_divergence

P3 = {"p3": FeatureSpec(8, 8)}


@pytest.mark.parametrize(("temperature", "figure"), [(1.0, 0.63078594), (4.0, 0.79724652)])
def test_official_figures(official, temperature, figure):
    loss = channel_wise_divergence(official.student, official.teacher, temperature)
    assert loss.item() == pytest.approx(figure, rel=official.rtol)
    method = CWD(P3, P3, alpha=3.0, temperature=temperature)
    loss = method({"p3": official.student}, {"p3": official.teacher})["loss_cwd_kl"]
    assert loss.item() == pytest.approx(3 * figure, rel=official.rtol)
    assert method.metrics()["p3/kl"].item() == pytest.approx(figure, rel=official.rtol)


def test_value_by_hand():
    """One channel, two positions: the teacher's 3/4 and 1/4 against the student's 1/2 and 1/2."""
    student, teacher = torch.zeros(1, 1, 1, 2), torch.tensor([3.0, 1.0]).log().view(1, 1, 1, 2)
    expected = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    torch.testing.assert_close(channel_wise_divergence(student, teacher, 1.0), expected)
    torch.testing.assert_close(channel_wise_divergence(2 * student, 2 * teacher, 2.0), 4 * expected)


def test_a_constant_added_to_a_channel_changes_nothing(official):
    before = channel_wise_divergence(official.student, official.teacher, 2.0)
    shift = torch.randn(2, 8, 1, 1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(channel_wise_divergence(official.student + 3 * shift, official.teacher, 2.0), before)
    torch.testing.assert_close(channel_wise_divergence(official.student, official.teacher - shift, 2.0), before)


def test_equal_maps_give_zero(official):
    assert channel_wise_divergence(official.student, official.student, 1.0).item() == pytest.approx(0, abs=1e-6)


def test_gradients(official):
    student = official.student.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: channel_wise_divergence(x, official.teacher[:1, :2, :3, :3], 2.0),
        (official.student[:1, :2, :3, :3].double().requires_grad_(),),
    )
    channel_wise_divergence(student, official.teacher, 1.0).backward()
    assert student.grad.abs().sum() > 0
    torch.testing.assert_close(student.grad.sum((2, 3)), torch.zeros(2, 8).double(), rtol=0, atol=1e-12)


def test_peaked_maps_stay_finite():
    """The logarithm of a softmax would be that of 0 here."""
    student = torch.zeros(1, 1, 2, 2)
    student[0, 0, 0, 0] = 1000
    student.requires_grad_()
    loss = channel_wise_divergence(student, student.detach().flip(3), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(1000) and student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(official, dtype):
    student, teacher = official.student.to(dtype), official.teacher.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = channel_wise_divergence(student, teacher, 1.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, channel_wise_divergence(student.float(), teacher.float(), 1.0))


@pytest.mark.parametrize(("shape", "zero"), [((0, 8, 6, 5), True), ((1, 8, 5, 3), False), ((1, 8, 1, 1), True)])
def test_few_images_and_odd_sizes(shape, zero):
    """For one position every distribution is the same."""
    student = torch.randn(shape, requires_grad=True)
    loss = CWD(P3, P3)({"p3": student}, {"p3": torch.randn(shape)})["loss_cwd_kl"]
    loss.backward()
    assert loss.shape == () and loss.isfinite() and student.grad.isfinite().all()
    assert (loss == 0) == zero


def test_levels_add_up(official):
    levels = {"p3": FeatureSpec(8, 8), "p4": FeatureSpec(8, 16)}
    student = {"p3": official.student, "p4": official.student[..., :4]}
    teacher = {"p3": official.teacher, "p4": official.teacher[..., :4]}
    apart = sum(channel_wise_divergence(student[k], teacher[k], 1.0) for k in levels)
    torch.testing.assert_close(CWD(levels, levels, alpha=1.0)(student, teacher)["loss_cwd_kl"], apart)


def test_logits_are_compared_class_by_class():
    levels = {"logits": FeatureSpec(8, 8, logits=True)}
    assert not list(CWD(levels, levels).parameters())


def test_faults_are_named(official):
    with pytest.raises(ConfigError) as error:
        CWD(P3, P3, alpha=-1.0)
    assert error.value.argument == "alpha" and error.value.value == -1
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError) as error:
            CWD(P3, P3, temperature=temperature)
        assert error.value.argument == "temperature" and error.value.value is temperature
        assert error.value.allowed == "> 0 and finite"
    with pytest.raises(ValueError, match=r"student \(2, 8, 6, 9\) and teacher \(2, 8, 6, 10\)"):
        channel_wise_divergence(official.student[..., :9], official.teacher, 1.0)
