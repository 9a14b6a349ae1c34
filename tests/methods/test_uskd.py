"""USKD: the numbers of the released code, invariants, the guard for labels without weight, faults."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import acam_kd
from acam_kd.core import FeatureSpec, Targets
from acam_kd.core.errors import ConfigError
from acam_kd.methods.uskd import USKD, nontarget_loss, rank_score, soft_labels, target_loss, weak_loss, zipf
from tests.contract import check_contract

SPECS = {"c4": FeatureSpec(5, 16), "classes": FeatureSpec(10, 0, logits=True)}


def wave(shape, a, b, scale=1.0, shift=0.0):
    """The reference tensors: scale * sin(a k + b) + shift over the flat index k."""
    k = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (scale * torch.sin(a * k + b) + shift).float().reshape(shape)


@pytest.fixture
def case(official):
    method = USKD(SPECS, SPECS)
    with torch.no_grad():
        for number, parameter in enumerate(method.weak_head.parameters()):
            parameter.copy_(wave(parameter.shape, 0.31, 0.17 * number, 0.5))
    stage = wave((6, 5), 0.33, 0.9, 2.0).requires_grad_()
    logits = official.student_logits.clone().requires_grad_()
    return method, stage, logits, official.labels


def losses_of(method, stage, logits, labels):
    maps = {"c4": stage[:, :, None, None], "classes": logits[:, :, None, None]}
    return method(maps, maps, Targets(labels={"classes": labels[:, None, None]}))


def test_official_losses(case):
    losses = losses_of(*case)
    assert losses["loss_uskd_target"].item() == pytest.approx(3.5797913, rel=1e-5)
    assert losses["loss_uskd_nontarget"].item() == pytest.approx(0.1 * 2.5319645, rel=1e-5)
    assert losses["loss_uskd_weak"].item() == pytest.approx(0.005 * 4.0451369, rel=1e-5)
    assert sum(losses.values()).item() == pytest.approx(3.8532135, rel=1e-5)


def test_official_total_with_the_weights_for_cifar(case):
    method, *rest = case
    method.alpha = method.beta = method.mu = 0.1
    assert sum(losses_of(method, *rest).values()).item() == pytest.approx(1.0156894, rel=1e-5)


def test_official_gradients(case):
    method, stage, logits, labels = case
    sum(losses_of(method, stage, logits, labels).values()).backward()
    assert logits.grad.abs().sum().item() == pytest.approx(1.7863576, rel=1e-5)
    assert logits.grad.sum(1).abs().max() < 1e-6
    assert stage.grad.abs().sum().item() == pytest.approx(0.010321554, rel=1e-4)
    assert method.weak_head.weight.grad.abs().sum().item() == pytest.approx(0.037280887, rel=1e-4)


def test_official_probabilities_and_soft_targets(case):
    _, _, logits, labels = case
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    expected = torch.tensor([0.20480773, 0.36356393, 8.7128370e-4, 0.025110025, 0.051436897, 0.0036196536])
    torch.testing.assert_close(p, expected, rtol=1e-5, atol=0)
    soft = torch.tensor([1.0123770, 1.1026096, 0.97043157, 0.97106135, 0.97307658, 0.97044396])
    assert target_loss(logits, soft_labels(labels)).item() == pytest.approx(-(soft * p.log()).mean().item(), rel=1e-5)
    assert soft.sum().item() == pytest.approx(6)


@pytest.mark.parametrize(
    ("form", "ranks", "loss"),
    [
        ("released", [5, 2, 1, 3, 6, 7, 10, 9, 8, 4], 2.5319645),
        ("symmetric", [7, 2, 1, 5, 6, 3, 9, 10, 8, 4], 2.8075216),
    ],
)
def test_official_ranks(case, form, ranks, loss):
    method, stage, logits, labels = case
    targets = soft_labels(labels)
    score = rank_score(logits, method.weak_head(stage), targets, form)
    found = (score[0] > score[0][:, None]).sum(1) + 1
    assert found.tolist() == ranks
    present = targets.present(10)
    soft = zipf(score, present)
    assert nontarget_loss(logits, soft, present).item() == pytest.approx(loss, rel=1e-5)
    if form == "released":
        expected = [.0770524, .1926311, .3852622, 0, .0642104, .0550375, .0385262, .0428069, .0481578, .0963155]  # fmt: skip
        torch.testing.assert_close(soft[0], torch.tensor(expected), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(soft.sum(1), torch.ones(6))


def mixed(labels):
    return 0.7 * F.one_hot(labels, 10) + 0.3 * F.one_hot((labels + 3) % 10, 10)


def test_official_losses_of_mixed_labels(case):
    method, stage, logits, labels = case
    targets = soft_labels(mixed(labels))
    weak = method.weak_head(stage)
    present = targets.present(10)
    terms = [
        target_loss(logits, targets), nontarget_loss(logits, zipf(rank_score(logits, weak, targets), present), present),
        weak_loss(weak, targets),
    ]  # fmt: skip
    assert [term.item() for term in terms] == pytest.approx([3.9973526, 2.5149162, 3.6935008], rel=1e-5)
    assert (terms[0] + 0.1 * terms[1] + 0.005 * terms[2]).item() == pytest.approx(4.2673116, rel=1e-5)


def test_a_label_without_weight_is_no_target(case):
    """The released code removes its class from the others, which gives 2.5486114."""
    method, stage, logits, labels = case
    targets = soft_labels(F.one_hot(labels, 10).float())
    present = targets.present(10)
    soft = zipf(rank_score(logits, method.weak_head(stage), targets), present)
    assert nontarget_loss(logits, soft, present).item() == pytest.approx(2.5319645, rel=1e-5)
    assert target_loss(logits, targets).item() == pytest.approx(3.5797913, rel=1e-5)


def test_one_image_has_the_cross_entropy():
    logits, labels = torch.randn(1, 5), torch.tensor([2])
    torch.testing.assert_close(target_loss(logits, soft_labels(labels)), F.cross_entropy(logits, labels))


def test_the_others_do_not_see_the_target_nor_a_shift(case):
    _, _, logits, labels = case
    present = soft_labels(labels).present(10)
    soft = zipf(torch.rand(6, 10), present)
    moved = (logits + 3).masked_fill(present, 50.0)
    torch.testing.assert_close(nontarget_loss(logits, soft, present), nontarget_loss(moved, soft, present))


def test_equal_scores_have_different_ranks():
    soft = zipf(torch.zeros(1, 4), torch.tensor([[True, False, False, False]]))
    torch.testing.assert_close(soft[0], torch.tensor([0, 1 / 2, 1 / 3, 1 / 4]) / (13 / 12))


@pytest.mark.parametrize("autocast", [False, True])
def test_contract(autocast):
    method = USKD(SPECS, SPECS)
    maps = {"c4": torch.randn(3, 5, 4, 4, requires_grad=True), "classes": torch.randn(3, 10, 1, 1, requires_grad=True)}
    known = Targets(labels={"classes": torch.tensor([1, 2, 3])[:, None, None]})
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        check_contract(method, maps, {name: x.detach() for name, x in maps.items()}, known)


def test_confident_predictions_stay_finite():
    method = USKD(SPECS, SPECS, form="symmetric")
    logits = torch.full((2, 10), -200.0).index_fill(1, torch.tensor([3]), 200.0).requires_grad_()
    losses = losses_of(method, torch.rand(2, 5), logits, torch.tensor([3, 4]))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values()) and logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("levels", "arguments", "argument"),
    [
        (SPECS, {"form": "other"}, "form"),
        (SPECS, {"mu": -1.0}, "mu"),
        ({"c4": SPECS["c4"]}, {}, "levels"),
        ({"classes": SPECS["classes"]}, {}, "levels"),
        ({**SPECS, "c5": SPECS["c4"]}, {}, "levels"),
        ({**SPECS, "classes": FeatureSpec(1, 0, logits=True)}, {}, "levels"),
    ],
)
def test_faults_name_the_argument(levels, arguments, argument):
    with pytest.raises(ConfigError) as error:
        USKD(levels, levels, **arguments)
    assert error.value.argument == argument


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 5, 3, stride=2)
        self.head = torch.nn.Linear(5, 10)

    def forward(self, x, labels=None):
        logits = self.head(self.stem(x).mean((2, 3)))
        return {"loss": F.cross_entropy(logits, labels)} if self.training else logits


def known_labels(x, labels):
    return Targets(labels={"classes": labels[:, None, None]})


def test_any_classifier_learns_without_a_teacher():
    levels = {"c1": "stem", "classes": "head"}
    student = acam_kd.distill(
        Net(), None, method="USKD", student_levels=levels, taps=("backbone", "classes"), targets=known_labels,
        example_inputs=torch.zeros(1, 3, 16, 16),
    ).train()  # fmt: skip
    losses = student(torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 3]))
    assert len(losses) == 4
    sum(losses.values()).backward()
    assert student.distillation.method.weak_head.weight.grad.abs().sum() > 0


def test_a_teacher_beside_it_is_refused():
    levels = {"c1": "stem", "classes": "head"}
    with pytest.raises(ConfigError) as error:
        acam_kd.distill(
            Net(), Net(), method="USKD", student_levels=levels, teacher_levels=levels, taps=("backbone", "classes"),
            example_inputs=torch.zeros(1, 3, 16, 16),
        )  # fmt: skip
    assert error.value.argument == "teacher" and "student alone" in error.value.hint
