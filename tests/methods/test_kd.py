"""KD: official figures, references, identities, stability."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from acam_kd.core import FeatureSpec
from acam_kd.methods.kd import KD, binary_kd_loss, kd_loss

SIGMOID = FeatureSpec(4, 0, logits=True, sigmoid=True)
MAP = FeatureSpec(4, 8, logits=True)


@pytest.fixture
def anchors():
    """Student and teacher, (N, K, A, 1), in float64."""
    draw = torch.Generator().manual_seed(2)
    return tuple(3 * torch.randn(2, 4, 15, 1, generator=draw, dtype=torch.float64) - 2 for _ in range(2))


@pytest.mark.parametrize(("temperature", "expected"), [(4.0, 4.3720174), (1.0, 2.6636212)])
def test_official_figures(official, temperature, expected):
    loss = kd_loss(official.student_logits, official.teacher_logits, temperature)
    assert loss.item() == pytest.approx(expected, rel=official.rtol)


def test_official_figures_per_pixel(official):
    loss = kd_loss(official.student, official.teacher)
    assert loss.item() == pytest.approx(0.48918974, rel=official.rtol)
    assert loss.item() / 8 == pytest.approx(0.061148722, rel=official.rtol)  # a mean over the 8 classes too


def test_the_classification_term_of_ld_is_kd(official):
    """Weight 10, a mean over 10 classes, divided by 6 positives, T = 2."""
    loss = kd_loss(official.student_logits, official.teacher_logits, 2.0)
    assert loss.item() * 10 / 10 == pytest.approx(3.8041282, rel=official.rtol)


def test_the_module_gives_the_official_figures(official):
    method = KD({"logits": FeatureSpec(8, 8, logits=True)}, {"logits": FeatureSpec(8, 8, logits=True)}, alpha=2.0)
    (loss,) = method({"logits": official.student}, {"logits": official.teacher}).values()
    assert loss.item() == pytest.approx(2 * 0.48918974, rel=official.rtol)


def test_kd_equals_the_formula():
    draw = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(2, 3, 4, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    total = 0.0
    for n in range(2):
        for h in range(4):
            for w in range(5):
                p, q = (x[n, :, h, w].div(3).softmax(0) for x in (student, teacher))
                total += (q * (q / p).log()).sum()
    torch.testing.assert_close(kd_loss(student, teacher, 3.0), 9 * total / 40)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_binary_kd_equals_the_formula(anchors, temperature):
    student, teacher = anchors
    p, q = ((x / temperature).sigmoid() for x in anchors)
    divergence = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    objects = teacher.sigmoid().amax(1).sum()
    assert objects > 1
    expected = temperature**2 * divergence.sum() / objects
    torch.testing.assert_close(binary_kd_loss(student, teacher, temperature), expected, rtol=1e-10, atol=0)


def test_background_alone_is_divided_by_one():
    teacher = torch.full((1, 2, 10, 1), -9.0)
    student = teacher + 1
    p, q = (x.double().sigmoid() for x in (student, teacher))
    expected = (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).sum().float()
    assert teacher.amax(1).sigmoid().sum() < 1
    torch.testing.assert_close(binary_kd_loss(student, teacher), expected, rtol=1e-4, atol=0)


def test_one_class_learns():
    spec = {"classes": FeatureSpec(1, 0, logits=True, sigmoid=True)}
    student = torch.zeros(1, 1, 3, 1, requires_grad=True)
    (loss,) = KD(spec, spec)({"classes": student}, {"classes": torch.tensor([[[[2.0], [-2.0], [0.0]]]])}).values()
    loss.backward()
    assert student.grad.flatten().sign().tolist() == [-1, 1, 0]


@pytest.mark.parametrize(("spec", "loss"), [(MAP, kd_loss), (SIGMOID, binary_kd_loss)])
def test_the_level_decides_between_softmax_and_sigmoid(anchors, spec, loss):
    student, teacher = anchors
    level = {spec.tap: spec}
    (found,) = KD(level, level, alpha=0.5, temperature=2.0)({spec.tap: student}, {spec.tap: teacher}).values()
    torch.testing.assert_close(found, 0.5 * loss(student, teacher, 2.0))


@pytest.mark.parametrize("loss", [kd_loss, binary_kd_loss])
def test_equal_predictions_give_zero_and_others_more(anchors, loss):
    student, teacher = anchors
    assert loss(teacher, teacher, 2.0) == 0
    assert loss(student, teacher, 2.0) > 0


def test_a_shift_of_all_classes_changes_softmax_only(anchors):
    student, teacher = anchors
    torch.testing.assert_close(kd_loss(student + 7, teacher - 3), kd_loss(student, teacher))
    assert (binary_kd_loss(student + 7, teacher) - binary_kd_loss(student, teacher)).abs() > 1


@pytest.mark.parametrize("loss", [kd_loss, binary_kd_loss])
def test_gradients(anchors, loss):
    student, teacher = anchors
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, 2.0), student.requires_grad_())


@pytest.mark.parametrize("loss", [kd_loss, binary_kd_loss])
def test_large_gaps(loss):
    """The student is sure of the opposite: the gap of 200, once, or twice a logit of 100."""
    teacher = torch.tensor([[[[100.0]], [[-100.0]]]])
    student = (-teacher).requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(200, rel=1e-5)
    assert student.grad.flatten().tolist() == pytest.approx([-1, 1])


def test_tiny_probabilities_are_not_lost():
    """A dense head has millions of anchors at -10, whose rounding errors must not add up to a loss."""
    teacher = torch.full((1, 1, 100_000, 1), -10.0)
    expected = binary_kd_loss((teacher + 0.1).double(), teacher.double()).float()
    torch.testing.assert_close(binary_kd_loss(teacher + 0.1, teacher), expected, rtol=1e-3, atol=0)


def test_reference_of_torch(anchors):
    student, teacher = anchors
    expected = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="sum") / 30
    torch.testing.assert_close(kd_loss(student, teacher), expected)
