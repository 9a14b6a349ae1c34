"""PKD: the official figures, invariants, the correlation itself, the cases without a deviation, faults."""

from __future__ import annotations

import pytest
import torch

from acam_kd.core import FeatureSpec
from acam_kd.core.errors import ConfigError
from acam_kd.methods.pkd import PKD, pearson_errors

P3 = {"p3": FeatureSpec(8, 8)}


def pearson_error(student, teacher):
    (error,) = pearson_errors([student], [teacher])
    return error


def test_official_figures(official):
    loss = pearson_error(official.student, official.teacher)
    assert loss.item() == pytest.approx(0.9951812, rel=official.rtol)
    scaled = pearson_error(3 * official.student + 2, 0.5 * official.teacher - 1)
    assert scaled.item() == pytest.approx(0.99518114, rel=official.rtol)
    larger = official.wave((2, 8, 12, 20), 0.37, 0.1)
    assert pearson_error(larger, official.teacher).item() == pytest.approx(0.98786467, rel=official.rtol)
    method = PKD(P3, P3, alpha=6.0)
    loss = method({"p3": official.student}, {"p3": official.teacher})["loss_pkd_pearson"]
    assert loss.item() == pytest.approx(6 * 0.9951812, rel=official.rtol)
    assert method.metrics()["p3/pearson"].item() == pytest.approx(0.9951812, rel=official.rtol)


def test_it_is_one_minus_the_correlation(official):
    """The form of the paper, with torch's own correlation."""
    student, teacher = (x.transpose(0, 1).flatten(1) for x in (official.student, official.teacher))
    each = [1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(student, teacher)]
    expected = (120 - 1) / 120 * torch.stack(each).mean()
    assert expected.item() == pytest.approx(0.99518348, rel=official.rtol)
    torch.testing.assert_close(pearson_error(official.student, official.teacher), expected, rtol=1e-5, atol=0)


def test_extremes(official):
    assert pearson_error(official.student, 2 * official.student + 1).item() == pytest.approx(0, abs=1e-9)
    opposite = pearson_error(-official.student, official.student)  # r = -1
    assert opposite.item() == pytest.approx(2 * 119 / 120, rel=1e-4)


def test_the_batch_is_standardised_together(official):
    alone = sum(pearson_error(s[None], t[None]) for s, t in zip(official.student, official.teacher)) / 2
    assert abs(alone - pearson_error(official.student, official.teacher)) > 1e-4


def test_gradients():
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 2, 3, 2, generator=draw, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: pearson_error(x, teacher), (student.requires_grad_(),))


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (0, 8, 4, 3)])
def test_no_deviation_no_loss(shape):
    student = torch.randn(shape, requires_grad=True)
    loss = PKD(P3, P3)({"p3": student}, {"p3": torch.randn(shape)})["loss_pkd_pearson"]
    loss.backward()
    assert loss.shape == () and loss.item() == 0
    assert student.grad is not None and (student.grad == 0).all()


def test_no_images_of_another_size():
    student = torch.randn(0, 8, 6, 4, requires_grad=True)
    loss = pearson_error(student, torch.randn(0, 8, 3, 2))
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_constant_channels_stay_finite(which):
    """A dead channel is 0 everywhere."""
    maps = {"student": torch.randn(2, 8, 3, 5), "teacher": torch.randn(2, 8, 3, 5)}
    for name in maps:
        if which in (name, "both"):
            maps[name][:, 0] = 0
    student = maps["student"].requires_grad_()
    loss = pearson_error(student, maps["teacher"])
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
    kept = pearson_error(student[:, 1:], maps["teacher"][:, 1:])
    undefined = 0.0 if which == "both" else 0.5 * 29 / 30  # the other's channel against zeros
    torch.testing.assert_close(8 * loss, 7 * kept + undefined, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 8, 5, 3), (2, 8, 1, 1), (3, 8, 7, 1)])
def test_odd_sizes(shape):
    student = torch.randn(shape, requires_grad=True)
    loss = pearson_error(student, torch.randn(shape))
    loss.backward()
    assert 0 < loss <= 2 and student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    """The squares of these features are over float16's largest number."""
    student, teacher = (1000 * torch.randn(2, 8, 6, 7)).to(dtype), (1000 * torch.randn(2, 8, 6, 7)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pearson_error(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, pearson_error(student.float(), teacher.float()))


def test_there_is_nothing_to_train():
    assert not list(PKD(P3, P3).parameters())


def test_faults_are_named(official):
    with pytest.raises(ConfigError) as error:
        PKD(P3, {"p3": FeatureSpec(12, 8)})
    assert error.value.argument == "levels"
    assert error.value.value == "p3 with 8 channels in the student and 12 in the teacher"
    assert "{method}" in error.value.hint and "{levels}" in error.value.hint
    with pytest.raises(ConfigError) as error:
        PKD(P3, P3, alpha=float("inf"))
    assert error.value.argument == "alpha" and error.value.value == float("inf")
    with pytest.raises(ValueError, match="differ in shape"):
        pearson_error(official.student[:, :7], official.teacher)
