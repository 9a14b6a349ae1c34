"""PS-KD: the numbers of the released code, the table of past predictions, its state, faults."""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import acam_kd
from acam_kd.core import FeatureSpec, Targets
from acam_kd.core.errors import ConfigError, RunError
from acam_kd.core.state import load_state, state_of
from acam_kd.methods.pskd import PSKD, progressive_cross_entropy, progressive_target
from tests.contract import check_contract

SPECS = {"classes": FeatureSpec(10, 0, logits=True)}


def step(method, logits, labels, ids=None):
    maps = {"classes": logits[:, :, None, None]}
    ids = torch.arange(len(logits)) if ids is None else ids
    return method(maps, maps, Targets(labels={"classes": labels[:, None, None]}, ids=ids))["loss_pskd_past"]


@pytest.mark.parametrize(
    ("epoch", "share", "loss", "gradient", "total"),
    [
        (0, 0.00266667, 3.6540477, (0.0065926597, 0.038093004, 0.073031120), 1.7783995),
        (9, 0.02666667, 3.6660416, (0.0063996306, 0.037012417, 0.072352476), 1.7456479),
        (149, 0.4, 3.8526056, (0.0033969735, 0.020203369, 0.061796095), 1.4656991),
        (299, 0.8, 4.0524964, (1.7983920e-4, 0.0021936656, 0.050485659), 1.2998703),
    ],
)
def test_official_numbers(official, epoch, share, loss, gradient, total):
    found = torch.tensor(0.8 * (epoch + 1) / 300)
    assert found.item() == pytest.approx(share, rel=1e-5)
    logits = official.student_logits.requires_grad_()
    target = progressive_target(official.labels, official.teacher_logits.softmax(1), found)
    result = progressive_cross_entropy(logits, target)
    result.backward()
    assert result.item() == pytest.approx(loss, rel=1e-5)
    assert logits.grad[0, :3].tolist() == pytest.approx(gradient, rel=1e-3)
    assert logits.grad.abs().sum().item() == pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(logits.grad, (logits.detach().softmax(1) - target) / 6, rtol=1e-4, atol=1e-7)


def test_official_simulation_of_three_epochs(official):
    """With the task's cross-entropy the loss is the published one."""
    method, losses = PSKD(SPECS, SPECS, epochs=3), []
    for epoch in range(3):
        logits = official.wave((6, 10), 0.7, 0.2 + 0.5 * epoch, 3)
        past, seen = method.past.read(list(range(6)), official.labels)
        target = progressive_target(official.labels, past, 0.8 * (seen + 1) / 3)
        assert target[0, 0].item() == pytest.approx((0, 0.021165140, 0.10825878)[epoch], rel=1e-5)
        losses.append((step(method, logits, official.labels) + F.cross_entropy(logits, official.labels)).item())
    assert losses == pytest.approx([3.6527154, 2.8781855, 2.3281739], rel=1e-5)


def test_the_first_epoch_is_the_tasks_alone():
    logits = torch.randn(4, 10, requires_grad=True)
    loss = step(PSKD(SPECS, SPECS, epochs=2), logits, torch.tensor([1, 2, 3, 4]))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


def test_each_image_has_its_own_epoch():
    method = PSKD(SPECS, SPECS, epochs=4)
    step(method, torch.randn(2, 10), torch.tensor([1, 2]), torch.tensor([5, 70000]))
    step(method, torch.randn(2, 10), torch.tensor([1, 2]), torch.tensor([5, 9]))
    assert method.past.read([5, 9, 70000, 3], torch.zeros(4, dtype=torch.int64))[1].tolist() == [2, 1, 1, 0]
    assert method.metrics()["classes/share"].item() == pytest.approx(0.8 * 1.5 / 4)
    assert method.metrics()["classes/images"].item() == 3


def test_of_an_image_twice_in_a_batch_the_last_prediction_counts():
    method, logits = PSKD(SPECS, SPECS, epochs=2), torch.randn(3, 10)
    step(method, logits, torch.tensor([1, 2, 1]), torch.tensor([4, 6, 4]))
    past, seen = method.past.read([4], torch.tensor([1]))
    torch.testing.assert_close(past[0], logits[2].softmax(0))
    assert seen.tolist() == [1]


def test_predictions_are_float32_under_autocast():
    method = PSKD(SPECS, SPECS, epochs=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(method, (30 * torch.randn(2, 10)).bfloat16(), torch.tensor([1, 2]))
    past = method.past.read([0, 1], torch.tensor([1, 2]))[0]
    assert past.dtype == torch.float32 and past.min() > 0 and past.sum(1).tolist() == pytest.approx([1, 1])


def test_the_state_has_the_table():
    method, labels = PSKD(SPECS, SPECS, epochs=3), torch.tensor([1, 2])
    step(method, torch.randn(2, 10), labels)
    buffer = io.BytesIO()
    torch.save(dict(state_of(method)), buffer)
    buffer.seek(0)
    again = PSKD(SPECS, SPECS, epochs=3)
    load_state(again, torch.load(buffer, weights_only=True))
    logits = torch.randn(2, 10)
    assert step(copy.deepcopy(method), logits, labels) == step(again, logits, labels) != 0


def test_the_table_of_other_classes_is_one_line():
    method, other = PSKD(SPECS, SPECS, epochs=3), {"classes": FeatureSpec(7, 0, logits=True)}
    step(method, torch.randn(2, 10), torch.tensor([1, 2]))
    with pytest.raises(RunError, match="10 classes for 7"):
        load_state(PSKD(other, other, epochs=3), state_of(method))


def test_contract():
    method = PSKD(SPECS, SPECS, epochs=2)
    known = Targets(labels={"classes": torch.tensor([1, 2, 3])[:, None, None]}, ids=torch.arange(3))
    method({"classes": torch.randn(3, 10, 1, 1)}, {"classes": torch.randn(3, 10, 1, 1)}, known)
    maps = {"classes": torch.randn(3, 10, 1, 1, requires_grad=True)}
    check_contract(method, maps, {name: x.detach() for name, x in maps.items()}, known)


@pytest.mark.parametrize(
    ("levels", "arguments", "argument"),
    [
        (SPECS, {"epochs": 0}, "epochs"),
        (SPECS, {"epochs": 2, "alpha": 1.5}, "alpha"),
        (SPECS, {"epochs": 2, "alpha": float("nan")}, "alpha"),
        ({"c4": FeatureSpec(5, 16), **SPECS}, {"epochs": 2}, "levels"),
        ({"classes": FeatureSpec(1, 0, logits=True)}, {"epochs": 2}, "levels"),
    ],
)
def test_faults_name_the_argument(levels, arguments, argument):
    with pytest.raises(ConfigError) as error:
        PSKD(levels, levels, **arguments)
    assert error.value.argument == argument


@pytest.mark.parametrize("known", [{}, {"labels": {"classes": torch.tensor([1, 2])[:, None, None]}}])
def test_missing_annotations_are_named(known):
    maps = {"classes": torch.randn(2, 10, 1, 1)}
    with pytest.raises(ConfigError) as error:
        PSKD(SPECS, SPECS, epochs=2)(maps, maps, Targets(**known))
    assert error.value.argument == "targets" and error.value.value == ("no ids" if known else "no labels")


def test_any_classifier_learns_from_its_past():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(5, 10)
    )
    student = acam_kd.distill(
        net, None, method="PSKD", epochs=2, student_levels={"classes": "3"}, example_inputs=torch.zeros(1, 3, 16, 16),
        targets=lambda x: Targets(labels={"classes": torch.tensor([1, 2])[:, None, None]}, ids=torch.tensor([0, 1])),
    ).train()  # fmt: skip
    losses = []
    for _ in range(2):
        student(torch.rand(2, 3, 16, 16))
        losses.append(student.distillation.losses["loss_pskd_past"].item())
    assert losses[0] == 0 != losses[1]


def test_two_processes_have_the_same_table_of_all_images(tmp_path):
    address = f"file://{tmp_path}/meeting"
    command = [sys.executable, "-m", "tests.methods.gather_worker"]
    started = [subprocess.Popen([*command, str(rank), address, f"{tmp_path}/"]) for rank in range(2)]
    assert [process.wait(120) for process in started] == [0, 0]
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["ids"].tolist() == two["ids"].tolist() == [0, 2, 1, 3] and torch.equal(one["table"], two["table"])
    expected = torch.arange(12.0).sin().reshape(4, 3).softmax(1)
    torch.testing.assert_close(one["table"][[0, 2, 1, 3]], expected)
    assert one["seen"].tolist() == [2] * 4 and one["losses"][0] == two["losses"][0] == 0 != one["losses"][1]
