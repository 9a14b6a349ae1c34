"""MCMI: the numbers of the released code, identities of the information, centroids, faults."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from acam_kd.core import FeatureSpec, Targets
from acam_kd.core.errors import ConfigError
from acam_kd.methods.mcmi import MCMI, class_centroids, conditional_mutual_information
from tests.contract import check_contract

SPECS = {"classes": FeatureSpec(10, 0, logits=True)}


@pytest.fixture
def centroids(official):
    """Those of the teacher's logits, in batches of 4 and 2."""
    parts = [(official.teacher_logits[a:b], official.labels[a:b]) for a, b in ((0, 4), (4, 6))]
    return class_centroids(parts, 10)


def test_official_centroids(centroids):
    table, present = centroids
    expected = [0.12599269, 0.011681434, 0.0017594162, 0.0042839688]
    assert table[1, :4].tolist() == pytest.approx(expected, rel=1e-5)
    assert present.nonzero()[:, 0].tolist() == [1, 3, 4, 5, 9]
    torch.testing.assert_close(table.sum(1), torch.ones(10))


@pytest.mark.parametrize(
    ("weight", "total"), [(0.1, 3.4186447), (0.15, 3.3016093), (0.2, 3.1845739), (0.25, 3.0675385)]
)
def test_official_totals(official, centroids, weight, total):
    cmi = conditional_mutual_information(official.student_logits, centroids[0], official.labels)
    assert cmi.item() == pytest.approx(2.3407075, rel=1e-5)
    cross_entropy = F.cross_entropy(official.student_logits, official.labels)
    assert (cross_entropy - weight * cmi).item() == pytest.approx(total, rel=1e-5)


def test_official_gradients(official, centroids):
    method, logits = MCMI(SPECS, SPECS), official.student_logits.requires_grad_()
    method.table.copy_(centroids[0])
    method.taken.fill_(True)
    maps = {"classes": logits[:, :, None, None]}
    loss = method(maps, maps, Targets(labels={"classes": official.labels[:, None, None]}))["loss_mcmi_cmi"]
    (F.cross_entropy(logits, official.labels) + loss).backward()
    expected = [0.0077075148, 0.044349380, 0.072630793]
    assert logits.grad[0, :3].tolist() == pytest.approx(expected, rel=1e-4)
    assert logits.grad.abs().sum().item() == pytest.approx(1.7944113, rel=1e-5)


def test_official_information_of_the_teacher_itself(official, centroids):
    cmi = conditional_mutual_information(official.teacher_logits, centroids[0], official.labels)
    assert cmi.item() == pytest.approx(0.067950659, rel=1e-4)
    assert F.cross_entropy(official.teacher_logits, official.labels).item() == pytest.approx(4.3607488, rel=1e-5)


def test_information_is_the_entropy_of_the_means_without_that_of_the_images():
    logits, labels = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 4
    p = logits.softmax(1)
    table = torch.stack([p[labels == c].mean(0) for c in range(4)])

    def entropy(x):
        return -(x * x.log()).sum(1).mean()

    torch.testing.assert_close(conditional_mutual_information(logits, table, labels), entropy(table) - entropy(p))


def test_equal_predictions_have_none():
    logits = torch.randn(1, 5).expand(6, 5)
    table, _ = class_centroids([(logits, torch.arange(6) % 5)], 5)
    assert conditional_mutual_information(logits, table, torch.arange(6) % 5).abs() < 1e-6


def test_a_probability_of_zero_stays_finite():
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    table, _ = class_centroids([(logits, torch.tensor([0, 1]))], 2)
    loss = conditional_mutual_information(logits.flip(0), table, torch.tensor([0, 1]))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all() and (table == 0).any()


def test_contract_and_absent_classes():
    method = MCMI(SPECS, SPECS)
    assert method.take_centroids([(torch.randn(4, 10), torch.tensor([0, 1, 2, 3]))]) == [4, 5, 6, 7, 8, 9]
    maps = {"classes": torch.randn(3, 10, 1, 1, requires_grad=True)}
    known = Targets(labels={"classes": torch.tensor([1, 2, 9])[:, None, None]})
    check_contract(method, maps, {name: x.detach() for name, x in maps.items()}, known)


@pytest.mark.parametrize(
    ("arguments", "argument"), [({"centroids": "never"}, "centroids"), ({"lambda_cmi": -0.1}, "lambda_cmi")]
)
def test_faults_name_the_argument(arguments, argument):
    with pytest.raises(ConfigError) as error:
        MCMI(SPECS, SPECS, **arguments)
    assert error.value.argument == argument


def test_missing_centroids_are_named():
    maps = {"classes": torch.randn(1, 10, 1, 1)}
    with pytest.raises(ConfigError, match="without centroids"):
        MCMI(SPECS, SPECS)(maps, maps, Targets(labels={"classes": torch.tensor([1])[:, None, None]}))
