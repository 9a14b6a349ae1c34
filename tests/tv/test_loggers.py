"""Loggers beside TensorBoard's file."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import sys
import types

import pytest

from acam_kd.tv import loggers
from acam_kd.tv.training import train

from .conftest import refuses


def test_csv_has_losses_and_metrics(settings, tmp_path):
    train(dataclasses.replace(settings, logger=("csv",), iterations=2), tmp_path / "run")
    with open(tmp_path / "run" / "csv" / "version_0" / "metrics.csv") as file:
        lines = [*csv.DictReader(file)]
    assert {line["step"] for line in lines} == {"2"}
    assert any(line["loss"] for line in lines) and any(line["AP"] for line in lines)


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_package_is_one_line(settings, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == name else find(asked))
    with refuses("logger", name, f"the package {name} to be installed", f"pip install {name}"):
        train(dataclasses.replace(settings, logger=(name,)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_failed_run_is_said_to_be_one(tmp_path, monkeypatch):
    calls = []
    fake = types.SimpleNamespace(
        log_hyperparams=lambda values: calls.append(values),
        log_metrics=lambda values, step: calls.append((values, step)),
        finalize=calls.append,
    )
    monkeypatch.setitem(loggers.LOGGERS, "csv", lambda _: fake)
    made = loggers.Loggers(("csv",), tmp_path, {"seed": 0})
    made.scalars({"loss": 1.0}, 3)
    made.close(failed=True)
    assert calls == [{"seed": 0}, ({"loss": 1.0}, 3), "failed"]
