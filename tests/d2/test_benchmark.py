"""What tools/benchmark.py measures: every variant makes a training step, and what does not fit is left out."""

from __future__ import annotations

import argparse
import importlib.util

import pytest

from .conftest import ROOT

spec = importlib.util.spec_from_file_location("benchmark_tool", ROOT / "tools/benchmark.py")
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


ONE_CLASS = ["MODEL.RETINANET.NUM_CLASSES", "1", "DISTILL.TEACHER.OPTS", '["MODEL.RETINANET.NUM_CLASSES", 1]']


def arguments(methods=("all",), opts=()):
    opts = ["MODEL.DEVICE", "cpu", *opts]
    path = str(ROOT / "configs/quick_schedules/acam_instant.yaml")
    return argparse.Namespace(config_file=path, size=[96, 96], batch=2, methods=[*methods], opts=opts)


@pytest.mark.parametrize("variant", [*benchmark.VARIANTS, *benchmark.METHODS, "PKD+KD"])
def test_a_variant_makes_a_step(variant, storage):
    benchmark.build(variant, arguments())()


def test_all_are_those_that_fit(capsys):
    assert benchmark.fitting(arguments()) == [*benchmark.VARIANTS, *benchmark.METHODS]
    assert capsys.readouterr().err == ""
    found = benchmark.fitting(arguments(opts=ONE_CLASS))
    assert {*benchmark.METHODS} - {*found} == {"DKD", "NKD"}
    assert "DKD is left out: " in capsys.readouterr().err


def test_those_asked_for():
    args = arguments(methods=["FGD", "PKD+KD"])
    assert benchmark.fitting(args) == [*benchmark.VARIANTS, "FGD", "PKD+KD"]
    with pytest.raises(ValueError, match="DKD"):
        benchmark.build("DKD", arguments(opts=ONE_CLASS))
