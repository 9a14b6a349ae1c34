"""benchmarks/gpu.py, small and on a CPU: every section measures something, and a failure costs its own row alone."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from benchmarks import gpu  # noqa: E402
from benchmarks.gpu_case import Case, Scale
from benchmarks.gpu_report import tables
from benchmarks.report import machine


def test_the_whole_script(tmp_path, capsys):
    gpu.main(["--output", str(tmp_path), "--small", "--budget", "9"])
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert list(record["sections"]) == list(gpu.SECTIONS) and record["device"] == "CPU"
    for name, section in record["sections"].items():
        assert section["rows"] and "error" not in section and not section["left_out"], name
        assert not [row["error"] for row in section["rows"].values() if "error" in row], name
        assert all(row.get("within", True) for row in section["rows"].values()), name
    exact = [row for row in record["sections"]["paths"]["rows"].values() if row["precision"] == "float64"]
    assert {row["path"] for row in exact} == {"auto", "map", "parts", "summary"}
    assert all(row["masks"] < 1e-12 and row["gradient"] < 1e-9 for row in exact)
    text = (tmp_path / "gpu.md").read_text()
    assert capsys.readouterr().out == text and "| ACAM-KD |" in text and "FAILED" not in text


def test_a_failure_costs_its_own_row(monkeypatch):
    def fails():
        raise RuntimeError("a kernel\nfailed")

    def cases(scale):
        yield Case("bad", fails, {"method": "x"})
        yield Case("good", lambda: {"losses": [1.0], "within": True, "missing": [], "not_finite": []})
        raise ValueError("no more cases")

    monkeypatch.setitem(gpu.SECTIONS, "methods", (cases, 9))
    section = gpu.measured("methods", Scale(small=True), 9)
    assert "RuntimeError: a kernel" in section["rows"]["bad"]["error"] and section["rows"]["bad"]["method"] == "x"
    assert section["rows"]["good"]["within"] and "no more cases" in section["error"]
    text = tables({**machine("cpu"), "sections": {"methods": section}})
    assert "FAILED bad: failed" in text and "FAILED methods: ValueError: no more cases" in text and "| good |" in text


def test_what_there_was_no_time_for_is_named(monkeypatch):
    monkeypatch.setitem(gpu.SECTIONS, "methods", (lambda scale: iter([Case("late", dict)]), 9))
    section = gpu.measured("methods", Scale(small=True), -1)
    assert section["left_out"] == ["late"] and not section["rows"]
    assert "Left out for want of time: late." in tables({**machine("cpu"), "sections": {"methods": section}})


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--output", str(tmp_path)])
    assert "no GPU was found; --small" in capsys.readouterr().err
