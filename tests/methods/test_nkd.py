"""NKD: official figures, references, invariants, stability."""

from __future__ import annotations

import pytest
import torch

from acam_kd.core import FeatureSpec, Targets
from acam_kd.methods.nkd import NKD, nontarget_cross_entropy, target_cross_entropy


@pytest.fixture
def predicted():
    """Student (P, K), teacher (P, K), labels (P,), in float64."""
    draw = torch.Generator().manual_seed(6)
    student, teacher = (2 * torch.randn(7, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.tensor([0, 1, 2, 3, 3, 0, 1])


@pytest.mark.parametrize(("gamma", "temperature", "expected"), [(1.5, 1.0, 6.094902), (1.0, 2.0, 11.122615)])
def test_official_figures(official, gamma, temperature, expected):
    """The six samples as positions of a map."""
    spec = {"logits": FeatureSpec(10, 8, logits=True)}
    method = NKD(spec, spec, gamma=gamma, temperature=temperature)
    student, teacher = (
        {"logits": x.T.reshape(1, 10, 2, 3)} for x in (official.student_logits, official.teacher_logits)
    )
    losses = method(student, teacher, Targets(labels={"logits": official.labels.reshape(1, 2, 3)}))
    assert sum(losses.values()).item() == pytest.approx(expected, rel=official.rtol)


def test_terms_equal_the_formulas(predicted):
    student, teacher, labels = predicted
    target = others = 0.0
    for s, t, y in zip(student, teacher, labels.tolist()):
        target -= t.softmax(0)[y] * s.softmax(0)[y].log() / 7
        n, m = (torch.cat([x[:y], x[y + 1 :]]).div(3).softmax(0) for x in (s, t))
        others -= 9 * (m * n.log()).sum() / 7
    torch.testing.assert_close(target_cross_entropy(*predicted), target)
    torch.testing.assert_close(nontarget_cross_entropy(*predicted, 3.0), others)


def test_cross_entropies_stay_positive_where_both_agree(predicted):
    _, teacher, labels = predicted
    assert target_cross_entropy(teacher, teacher, labels) > 0
    assert nontarget_cross_entropy(teacher, teacher, labels) > 0


def test_the_other_term_ignores_the_target_and_shifts(predicted):
    student, teacher, labels = predicted
    at_target = torch.nn.functional.one_hot(labels, 4) * 5
    expected = nontarget_cross_entropy(*predicted, 2.0)
    torch.testing.assert_close(nontarget_cross_entropy(student + at_target, teacher - at_target, labels, 2.0), expected)
    torch.testing.assert_close(nontarget_cross_entropy(student + 3, teacher - 2, labels, 2.0), expected)
    assert nontarget_cross_entropy(student * 2, teacher, labels, 2.0) != expected


def test_the_target_term_is_not_softened(official):
    spec = {"logits": FeatureSpec(8, 8, logits=True)}
    inputs = {"logits": official.student}, {"logits": official.teacher}
    targets = Targets(labels={"logits": torch.arange(120).reshape(2, 6, 10) % 8})
    cold = NKD(spec, spec, alpha=1.0, gamma=1.0)(*inputs, targets)
    warm = NKD(spec, spec, alpha=2.0, gamma=0.5, temperature=4.0)(*inputs, targets)
    torch.testing.assert_close(warm["loss_nkd_target"], 2 * cold["loss_nkd_target"])
    assert warm["loss_nkd_nontarget"] > 2 * cold["loss_nkd_nontarget"]  # T^2 = 16 times about the same


def test_two_classes_have_no_other_term(predicted):
    student, teacher, labels = predicted[0][:, :2], predicted[1][:, :2], predicted[2] % 2
    assert nontarget_cross_entropy(student, teacher, labels) == 0
    assert target_cross_entropy(student, teacher, labels) > 0


@pytest.mark.parametrize("loss", [target_cross_entropy, nontarget_cross_entropy])
def test_gradients(predicted, loss):
    student, teacher, labels = predicted
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, labels), student.requires_grad_())


def test_large_gaps():
    """The student is sure of what the teacher is sure it is not; the gaps are the values."""
    teacher = torch.tensor([[200.0, 0.0, -200.0]])
    student = (-teacher).requires_grad_()
    labels = torch.tensor([0])
    target, others = target_cross_entropy(student, teacher, labels), nontarget_cross_entropy(student, teacher, labels)
    assert target.item() == pytest.approx(400) and others.item() == pytest.approx(200)
    (target + others).backward()
    assert student.grad.isfinite().all() and student.grad.abs().sum() > 1
