"""DKD: official figures, the identity with KD, references, stability."""

from __future__ import annotations

import pytest
import torch

from acam_kd.core import FeatureSpec, Targets
from acam_kd.methods.dkd import DKD, nontarget_kl, target_kl
from acam_kd.methods.kd import kd_loss


@pytest.fixture
def predicted():
    """Student (P, K), teacher (P, K), labels (P,), in float64."""
    draw = torch.Generator().manual_seed(4)
    student, teacher = (2 * torch.randn(7, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.tensor([0, 1, 2, 3, 3, 0, 1])


def reference(student, teacher, labels, temperature):
    """TCKD and NCKD of every position, as they are written."""
    terms = []
    for s, t, y in zip(student, teacher, labels.tolist()):
        p, q = (x.div(temperature).softmax(0) for x in (s, t))
        rest_p, rest_q = (torch.cat([x[:y], x[y + 1 :]]).div(temperature).softmax(0) for x in (s, t))
        target = q[y] * (q[y] / p[y]).log() + (1 - q[y]) * ((1 - q[y]) / (1 - p[y])).log()
        terms.append(torch.stack([target, (rest_q * (rest_q / rest_p).log()).sum()]))
    return temperature**2 * torch.stack(terms)


def test_official_figures(official):
    inputs = official.student_logits, official.teacher_logits, official.labels
    tckd, nckd = target_kl(*inputs, 4.0), nontarget_kl(*inputs, 4.0)
    assert tckd.item() == pytest.approx(0.29498291, rel=official.rtol)
    assert nckd.item() == pytest.approx(4.4078736, rel=official.rtol)


@pytest.mark.parametrize(
    ("alpha", "beta", "temperature", "expected"), [(1.0, 8.0, 4.0, 35.557972), (1.0, 0.5, 1.0, 1.4036087)]
)
def test_official_figures_of_the_module(official, alpha, beta, temperature, expected):
    """The six samples as regions of a head."""
    spec = {"classes": FeatureSpec(10, 0, logits=True)}
    method = DKD(spec, spec, alpha=alpha, beta=beta, temperature=temperature)
    student, teacher = ({"classes": x[..., None, None]} for x in (official.student_logits, official.teacher_logits))
    losses = method(student, teacher, Targets(labels={"classes": official.labels[:, None, None]}))
    assert sum(losses.values()).item() == pytest.approx(expected, rel=official.rtol)


def test_kd_is_the_target_term_and_what_is_left_of_the_other(official):
    """KD = mean of TCKD + (1 - p_y of the teacher) NCKD; every sample taken alone."""
    total = 0.0
    for s, t, y in zip(official.student_logits.split(1), official.teacher_logits.split(1), official.labels.split(1)):
        left = 1 - (t / 4).softmax(1)[0, y]
        total += (target_kl(s, t, y, 4.0) + left * nontarget_kl(s, t, y, 4.0)).item() / 6
    assert total == pytest.approx(4.3720169, rel=official.rtol)
    assert total == pytest.approx(kd_loss(official.student_logits, official.teacher_logits, 4.0).item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_terms_equal_the_formulas(predicted, temperature):
    expected = reference(*predicted, temperature).mean(0)
    torch.testing.assert_close(target_kl(*predicted, temperature), expected[0])
    torch.testing.assert_close(nontarget_kl(*predicted, temperature), expected[1])


def test_invariants(predicted):
    student, teacher, labels = predicted
    assert target_kl(teacher, teacher, labels) == 0 and nontarget_kl(teacher, teacher, labels) == 0
    at_target = torch.nn.functional.one_hot(labels, 4) * 5
    torch.testing.assert_close(nontarget_kl(student + at_target, teacher, labels), nontarget_kl(*predicted))
    assert (target_kl(student + at_target, teacher, labels) - target_kl(*predicted)).abs() > 0.1


def test_two_classes_have_no_other_term(predicted):
    student, teacher, labels = predicted[0][:, :2], predicted[1][:, :2], predicted[2] % 2
    assert nontarget_kl(student, teacher, labels) == 0
    torch.testing.assert_close(target_kl(student, teacher, labels, 2.0), kd_loss(student, teacher, 2.0))


@pytest.mark.parametrize("loss", [target_kl, nontarget_kl])
def test_gradients(predicted, loss):
    student, teacher, labels = predicted
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, labels, 2.0), student.requires_grad_())


@pytest.mark.parametrize(("label", "gap"), [(0, 400), (2, 200)])
def test_large_gaps(label, gap):
    """p_y is 1 - 1e-87 or 1e-87: in float32 log(1 - p) or log(p) would be infinite; the gaps are the values."""
    teacher = torch.tensor([[200.0, 0.0, -200.0]])
    student = (-teacher).requires_grad_()
    labels = torch.tensor([label])
    exact = [loss(student.double(), teacher.double(), labels).item() for loss in (target_kl, nontarget_kl)]
    losses = [loss(student, teacher, labels) for loss in (target_kl, nontarget_kl)]
    assert [loss.item() for loss in losses] == pytest.approx(exact, rel=1e-6)
    assert exact == pytest.approx([gap, 200])
    sum(losses).backward()
    assert student.grad.isfinite().all() and student.grad.abs().sum() > 1


def test_weights_scale_their_terms(official):
    spec = {"logits": FeatureSpec(8, 8, logits=True)}
    inputs = {"logits": official.student}, {"logits": official.teacher}
    targets = Targets(labels={"logits": torch.arange(120).reshape(2, 6, 10) % 8})
    one = DKD(spec, spec, alpha=1.0, beta=1.0)(*inputs, targets)
    other = DKD(spec, spec, alpha=3.0, beta=0.5)(*inputs, targets)
    torch.testing.assert_close(other["loss_dkd_target"], 3 * one["loss_dkd_target"])
    torch.testing.assert_close(other["loss_dkd_nontarget"], 0.5 * one["loss_dkd_nontarget"])
