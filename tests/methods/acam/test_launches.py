"""The kernels that the distiller launches for five levels, counted by operators: on a GPU small ones cost their launch."""

from __future__ import annotations

import pytest
import torch

from acam_kd.core import FeatureSpec
from acam_kd.methods import ACAMKD, PKD, Mimic

from ...launches import Launches

SIZES = {"p3": (25, 42), "p4": (13, 21), "p5": (7, 11), "p6": (4, 6), "p7": (2, 3)}
UNIFORM = {"spatial_masking": "UniformMasking", "channel_masking": ""}


def launches(make, path="", dtype=torch.bfloat16, **options):
    """Count the launches of a second step, forward and backward; features have the type, and autocast is on."""
    torch.manual_seed(0)
    levels = {level: FeatureSpec(256, 8) for level in SIZES}
    method = make(levels, levels, **options)
    for fusion in method.fusion.values() if path else ():
        fusion.path = path
    student, teacher = (
        {level: torch.randn(2, 256, *size).to(dtype) for level, size in SIZES.items()} for _ in range(2)
    )
    for x in student.values():
        x.requires_grad_()
    counts = []
    for _ in range(2):
        method.zero_grad()
        for x in student.values():
            x.grad = None
        with Launches() as forward, torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            losses = method(student, teacher)
        loss = torch.stack(list(losses.values())).sum()
        with Launches() as backward:
            loss.backward()
        counts = [forward, backward]
    return counts


CASES = {
    "the path of a GPU": (ACAMKD, {"path": "parts"}, 130, 170),
    "in float32": (ACAMKD, {"path": "parts", "dtype": torch.float32}, 150, 200),
    "in float32, the attention in bfloat16": (
        ACAMKD, {"path": "parts", "dtype": torch.float32, "attention_precision": "bfloat16"}, 150, 200,
    ),
    "the full gradient": (ACAMKD, {"path": "parts", "mask_gradient": "full"}, 150, 230),
    "spatial masks alone": (ACAMKD, {"path": "parts", "channel_masking": ""}, 150, 200),
    "uniform masks": (ACAMKD, UNIFORM, 60, 40),
    "standardised features": (ACAMKD, {"path": "parts", "features": "standardized"}, 150, 200),
    "mimicking": (Mimic, {}, 55, 45),
    "mimicking of standardised features": (Mimic, {"features": "standardized"}, 45, 55),
    "PKD": (PKD, {}, 32, 40),
}  # fmt: skip


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.6 splits some operators' backward into more")
@pytest.mark.parametrize("case", CASES)
def test_launches(case):
    make, options, most_forward, most_backward = CASES[case]
    forward, backward = launches(make, **options)
    assert 0 < forward.total <= most_forward, forward.names
    assert 0 < backward.total <= most_backward, backward.names


def test_a_step_that_logs_nothing_launches_no_metrics():
    """Metrics are made when they are asked for, and nothing waits for the device before."""
    forward, backward = launches(ACAMKD, path="parts")
    assert not {"std", "min", "_local_scalar_dense", "item", "nonzero"} & {*forward.names, *backward.names}
