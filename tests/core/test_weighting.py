"""The weight over time: warm-up, end, and a share of the task's gradient."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import acam_kd
from acam_kd.core.weighting import START, Weighting, WeightSchedule

from .detectors import Detector, refused

WORKER = Path(__file__).with_name("weighting_worker.py")
LEVELS = {"student_levels": {"p3": "backbone"}, "teacher_levels": {"p3": "backbone"}}


class Net(nn.Module):
    """A student whose loss has a scale of its own."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.backbone, self.head, self.scale = nn.Conv2d(3, 4, 3, stride=8, padding=1), nn.Conv2d(4, 2, 1), scale

    def forward(self, batch):
        return {"loss_cls": self.scale * self.head(self.backbone(batch)).square().mean()}


def attached(scale=1.0, **options):
    torch.manual_seed(0)
    return acam_kd.distill(Net(scale), Net(), method="Mimic", **LEVELS, **options)


def gradients(model, batch):
    """The gradient of each loss at the tapped map, by two backward passes."""
    kept = []
    handle = model.backbone.register_forward_hook(lambda module, args, output: kept.append(output))
    losses = model(batch)
    handle.remove()
    task, own = (torch.autograd.grad(losses[name], kept[0], retain_graph=True)[0] for name in losses)
    sum(losses.values()).backward()
    return task, own


def step(model, batch):
    sum(model(batch).values()).backward()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_gradient_has_its_share_whatever_the_scale(scale):
    model, batch = attached(scale, weight="share", share=0.25), torch.randn(2, 3, 32, 48)
    assert model.distillation.weighting.scale == START
    step(model, batch)
    task, own = gradients(model, batch)
    assert (own.norm() / task.norm()).item() == pytest.approx(0.25, rel=1e-3)
    assert model.distillation.metrics()["weight"].item() == pytest.approx(model.distillation.weighting.scale)


def test_no_gradient_is_changed_by_the_measurement():
    """The losses of a measured step have the same gradients as those of any other."""
    batch = torch.randn(2, 3, 32, 48)
    found = []
    for every in (1, 100):
        model = attached(weight="share")
        object.__setattr__(model.distillation.weighting.schedule, "every", every)
        model.distillation.weighting.scale = 1.0
        step(model, batch)
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_it_is_a_running_estimate_of_every_so_many_steps():
    model, batch = attached(weight="share"), torch.randn(2, 3, 32, 48)
    scales = []
    for n in range(42):
        if n == 19:
            model.scale = 100.0
        step(model, batch)
        scales.append(model.distillation.weighting.scale)
    assert scales[0] == START and scales[1] == scales[20]  # what step 20 measures counts from step 21 on
    assert scales[21] / scales[20] == pytest.approx(100**0.1, rel=1e-3) and scales[21] == scales[40] < scales[41]


def test_a_resumed_run_has_the_scale():
    model, batch = attached(weight="share"), torch.randn(2, 3, 32, 48)
    for _ in range(2):
        step(model, batch)
    state = model.distillation.state_dict()
    assert "weighting.scale" in state and not any("weighting" in name for name in model.state_dict())
    other = attached(weight="share")
    other.distillation.load_state_dict(state)
    assert other.distillation.weighting.scale == model.distillation.weighting.scale != START
    fixed = attached()
    fixed.distillation.load_state_dict(state)
    assert fixed.distillation.weighting.scale == 1 and "weighting.scale" not in fixed.distillation.state_dict()
    assert copy.deepcopy(model).distillation.weighting.scale == model.distillation.weighting.scale


def test_warm_up_and_end():
    model, batch = attached(warmup_iters=4, stop_at=6), torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        full = attached()
    whole = {name: loss.item() for name, loss in full(batch).items()}
    found = []
    for _ in range(8):
        losses = model(batch)
        found.append(losses["loss_mimic_mse"].item() / whole["loss_mimic_mse"] if "loss_mimic_mse" in losses else 0)
        sum(losses.values()).backward()
    assert found == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0, 0])
    assert all(p.grad is not None for p in model.parameters())


def test_a_loss_that_stays_large_is_reported_with_the_weight():
    model, batch = attached(alpha=1e4), torch.randn(2, 3, 32, 48)
    for n in range(101):
        assert "ratio" not in model.distillation.warnings(), n
        step(model, batch)
    assert "lower MIMIC.ALPHA, or set WEIGHT to share" in model.distillation.warnings(str.upper)["ratio"]
    model.scale = 1e6
    step(model, batch)
    assert "ratio" not in model.distillation.warnings()


def test_settings_out_of_range_are_refused():
    for options, argument, allowed in (
        ({"weight": "free"}, "weight", "one of fixed, share"), ({"share": 0.0}, "share", "> 0 and finite"),
        ({"warmup_iters": -1}, "warmup_iters", ">= 0"), ({"stop_at": -1}, "stop_at", ">= 0"),
    ):  # fmt: skip
        with refused(argument, "", allowed):
            acam_kd.distill(Detector(), Detector(), method="Mimic", **options)


def test_a_gradient_of_zero_changes_nothing():
    weighting = Weighting(WeightSchedule("share"))
    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    y = weighting.split({"p3": x * 1}, 0)["p3"]
    (0 * y).sum().backward()
    weighting.split({"p3": x * 1}, 1)
    assert weighting.scale == START


@pytest.mark.slow
def test_all_processes_scale_alike():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"})
