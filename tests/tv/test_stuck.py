"""The warning about a loss of the task that stays where it is, as that of a box head whose last ReLU has died."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from acam_kd.tv.reports import Reports


@pytest.fixture
def said(settings, caplog):
    """Report steps of 20, whose losses are given, and return the warnings."""
    folder = SimpleNamespace(first=True, log=lambda *_: None)

    def report(attached=None, every=20, **losses):
        reports = Reports(folder, settings)
        for number, values in enumerate(zip(*losses.values()), 1):
            step = {name: torch.tensor(value) for name, value in zip(losses, values)}
            reports.step(every * number, step, attached, seconds=1.0, rate=0.1)
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    return report


def test_a_dead_box_head_is_said_once(said):
    """The values are those of a real run, which had 0 AP."""
    (text,) = said(
        boxes=[0.99998, 1.0, 1.00003, 1.0, 1.0, 1.0, 1.0, 1.0], classes=[0.8, 0.7, 0.9, 0.7, 0.8, 0.6, 0.7, 0.7]
    )
    assert text.startswith(
        "boxes has stayed at 1 for 100 steps: it seems that nothing trains it. A detector's box head "
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


def attached(period, stop=0):
    """Return what the reports ask of a distillation that runs every so many steps."""
    return SimpleNamespace(
        returned=SimpleNamespace(losses={"loss_acam_diversity": None}),
        weighting=SimpleNamespace(ended=lambda _: bool(stop)),
        iteration=0,
        metrics=dict,
        last_of=lambda _: period <= 20,
        warnings=lambda _: {},
    )


def test_losses_that_are_not_the_tasks_may_stay(said):
    """ACAM-KD's diversity loss stays at its least value, on images without labels, too."""
    names = ("loss_acam_diversity", "loss_unlabelled_acam_diversity", "loss_hard")
    still = {name: [0.25] * 9 for name in names}
    assert said(attached(1), **still) == []
    assert len(said(attached(1), **still, boxes=[0.25] * 9)) == 1


def test_every_step_counts_whatever_is_distilled_and_logged(said):
    (text,) = said(attached(period=50), every=1, boxes=[0.25] * 121)
    assert "for 100 steps" in text  # looked at from step 20 to 120, though nothing was logged
    assert said(attached(period=50), every=1, boxes=[0.25] * 119)[1:] == []


def test_the_log_does_not_end_with_the_distillation(settings):
    lines = []
    folder = SimpleNamespace(first=True, log=lambda step, values: lines.append((step, sorted(values))))
    longer = replace(settings, iterations=100)
    for step in range(1, 61):
        losses = {"boxes": torch.tensor(1 / step)}
        reports = Reports(folder, longer)
        reports.step(step, losses, attached(period=50, stop=10), seconds=1.0, rate=0.1)
    assert lines == [(step, ["boxes", "loss", "seconds"]) for step in (20, 40, 60)]
