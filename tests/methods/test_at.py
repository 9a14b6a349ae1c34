"""AT: the official figure, invariants, a value by hand, faults."""

from __future__ import annotations

import pytest
import torch

from acam_kd.core import FeatureSpec
from acam_kd.core.errors import ConfigError
from acam_kd.methods.at import AT, attention_transfer

P3 = {"p3": FeatureSpec(8, 8)}


def test_official_figure(official):
    loss = attention_transfer(official.student, official.teacher)
    assert loss.item() == pytest.approx(0.0034637707, rel=official.rtol)
    method = AT(P3, P3)
    loss = method({"p3": official.student}, {"p3": official.teacher})["loss_at_attention"]
    assert loss.item() == pytest.approx(3.4637707, rel=official.rtol)
    assert method.metrics()["p3/attention"].item() == pytest.approx(0.0034637707, rel=official.rtol)


def test_value_by_hand():
    """The energies 3 and 4 have the norm 5; the teacher's energy is all at the first of two positions."""
    student = torch.tensor([3.0, 4.0]).sqrt().view(1, 1, 1, 2)
    teacher = torch.tensor([[5.0, 0.0], [1.0, 0.0]]).view(1, 2, 1, 2)
    assert attention_transfer(student, teacher).item() == pytest.approx((0.4**2 + 0.8**2) / 2)


def test_scale_and_sign_do_not_count(official):
    before = attention_transfer(official.student, official.teacher)
    per_image = torch.tensor([0.01, -30.0]).view(2, 1, 1, 1)
    torch.testing.assert_close(attention_transfer(per_image * official.student, official.teacher), before)
    assert attention_transfer(per_image * official.student, official.student).item() == pytest.approx(0, abs=1e-12)


def test_the_number_of_channels_is_free(official):
    levels = {"p3": FeatureSpec(4, 8)}, P3
    student = official.student[:, :4].clone().requires_grad_()
    method = AT(*levels)
    loss = method({"p3": student}, {"p3": official.teacher})["loss_at_attention"]
    loss.backward()
    assert loss > 0 and student.grad.abs().sum() > 0 and not list(method.parameters())


def test_gradients():
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, c, 3, 2, generator=draw, dtype=torch.float64) for c in (2, 3))
    assert torch.autograd.gradcheck(lambda x: attention_transfer(x, teacher), (student.requires_grad_(),))


def test_a_map_of_zeros_stays_finite(official):
    student = torch.zeros_like(official.student, requires_grad=True)
    loss = attention_transfer(student, official.teacher)
    loss.backward()
    assert loss.item() == pytest.approx(1 / 60)  # the teacher's norm is 1
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(("shape", "zero"), [((0, 8, 6, 5), True), ((1, 8, 5, 3), False), ((1, 8, 1, 1), True)])
def test_few_images_and_odd_sizes(shape, zero):
    """For one position every map is the same."""
    student = torch.randn(shape, requires_grad=True)
    loss = AT(P3, P3)({"p3": student}, {"p3": torch.randn(shape)})["loss_at_attention"]
    loss.backward()
    assert loss.shape == () and loss.isfinite() and student.grad.isfinite().all()
    assert (loss == 0) == zero


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    """The squares of these features are over float16's largest number."""
    student, teacher = (1000 * torch.randn(2, 8, 6, 7)).to(dtype), (1000 * torch.randn(2, 8, 6, 7)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = attention_transfer(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, attention_transfer(student.float(), teacher.float()))


def test_faults_are_named(official):
    with pytest.raises(ConfigError) as error:
        AT(P3, P3, alpha=-1.0)
    assert error.value.argument == "alpha" and error.value.value == -1
    with pytest.raises(ValueError, match=r"student \(2, 6, 9\) and teacher \(2, 6, 10\)"):
        attention_transfer(official.student[..., :9], official.teacher)
