"""Learning rates against values by hand."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.solver import build_lr_scheduler as stock

from acam_kd.core.errors import ConfigError
from acam_kd.d2 import build_lr_scheduler


def config(**solver):
    cfg = get_cfg()
    cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS = "WarmupPolyLR", 10, 0
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    return cfg


def rates(cfg, build=build_lr_scheduler):
    """The learning rate of every iteration, and the one after the last."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    scheduler = build(cfg, optimizer)
    seen = [optimizer.param_groups[0]["lr"]]
    for _ in range(cfg.SOLVER.MAX_ITER):
        optimizer.step()
        scheduler.step()
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


def test_polynomial_decay_ends_at_the_floor():
    seen = rates(config(BASE_LR=0.02, BASE_LR_END=1e-4))
    assert seen == pytest.approx([1e-4 + (0.02 - 1e-4) * (1 - it / 10) ** 0.9 for it in range(11)])
    assert seen[0] == 0.02 and seen[5] == pytest.approx(0.010764, abs=1e-6) and seen[10] == pytest.approx(1e-4)


def test_the_power_and_no_floor():
    assert rates(config(BASE_LR=1.0, POLY_LR_POWER=2.0))[::5] == pytest.approx([1, 0.25, 0])


def test_the_warm_up_meets_the_decay():
    seen = rates(config(BASE_LR=1.0, POLY_LR_POWER=1.0, WARMUP_ITERS=4, WARMUP_FACTOR=0.1))
    assert seen == pytest.approx([0.1, 0.225, 0.35, 0.475, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0])


def test_iterations_after_the_last_keep_the_floor():
    cfg = config(BASE_LR=1.0, BASE_LR_END=0.1)
    scheduler = build_lr_scheduler(cfg, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))
    scheduler.last_epoch = 12
    assert scheduler.get_lr() == [0.1]


@pytest.mark.parametrize(
    ("solver", "argument", "value", "said"),
    [
        ({"BASE_LR": 0.01, "BASE_LR_END": 0.1}, "SOLVER.BASE_LR_END", 0.1, "expected 0 to SOLVER.BASE_LR, 0.01"),
        ({"BASE_LR_END": -0.1}, "SOLVER.BASE_LR_END", -0.1, "expected 0 to SOLVER.BASE_LR"),
        ({"BASE_LR": 0.0, "BASE_LR_END": 0.0}, "SOLVER.BASE_LR_END", 0.0, "SOLVER.BASE_LR, 0.0, which is above 0"),
        (
            {"POLY_LR_CONSTANT_ENDING": 0.01},
            "SOLVER.POLY_LR_CONSTANT_ENDING",
            0.01,
            "expected 0; set the learning rate at the end by SOLVER.BASE_LR_END",
        ),
    ],
)
def test_values_that_are_refused(solver, argument, value, said):
    with pytest.raises(ConfigError) as error:
        rates(config(**solver))
    assert error.value.argument == argument and error.value.value == value and said in str(error.value)


@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupCosineLR"])
def test_other_names_are_detectron2s(name):
    cfg = config(LR_SCHEDULER_NAME=name, STEPS=(5,))
    assert rates(cfg) == rates(cfg, stock)
