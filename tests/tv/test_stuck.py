"""The warning about a loss of the task that stays where it is, as that of a box head whose last ReLU has died."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from acam_kd.tv.reports import Reports


@pytest.fixture
def said(settings, caplog):
    """Report steps of 20, whose losses are given, and return the warnings."""
    folder = SimpleNamespace(first=True, log=lambda *_: None)

    def report(attached=None, **losses):
        reports = Reports(folder, settings)
        for number, values in enumerate(zip(*losses.values()), 1):
            step = {name: torch.tensor(value) for name, value in zip(losses, values)}
            reports.step(20 * number, step, attached, seconds=1.0, rate=0.1)
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    return report


def test_a_dead_box_head_is_said_once(said):
    """The values are those of a real run, which had 0 AP."""
    (text,) = said(
        boxes=[0.99998, 1.0, 1.00003, 1.0, 1.0, 1.0, 1.0, 1.0], classes=[0.8, 0.7, 0.9, 0.7, 0.8, 0.6, 0.7, 0.7]
    )
    assert text.startswith(
        "boxes has stayed at 1 for 100 steps: nothing trains it, as where the ReLU after a box head "
    )
    assert text.endswith("lower --lr, lengthen --warmup, or choose another --seed")


@pytest.mark.parametrize(
    "values",
    [
        [1.0] * 5,  # 80 steps
        [1.0, 1.0, 1.0, 1.002] * 4,
        [0.0] * 9,  # nothing to find, as without boxes
        [float("nan")] * 9,  # a run with a loss that is not finite ends by itself
        [1 - 0.0003 * k for k in range(20)],  # slow, but it learns
    ],
)
def test_a_loss_that_moves_is_not(said, values):
    assert said(boxes=values) == []


def test_the_losses_of_a_method_may_stay(said):
    """ACAM-KD's diversity loss stays at its least value."""
    attached = SimpleNamespace(
        returned=SimpleNamespace(losses={"loss_acam_diversity": None}), metrics=dict, last_of=lambda _: True,
        warnings=lambda _: {},
    )  # fmt: skip
    assert said(attached, loss_acam_diversity=[0.25] * 9) == []
    assert len(said(attached, loss_acam_diversity=[0.25] * 9, boxes=[0.25] * 9)) == 1
