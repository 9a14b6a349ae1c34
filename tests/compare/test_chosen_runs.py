"""Rows whose runs depend on others: the best candidate of a tuning, and the run of another row."""

from __future__ import annotations

import pytest

from acam_kd import compare
from acam_kd.core.errors import ConfigError

from .conftest import TUNING, starts


def test_a_row_runs_with_its_best_candidate(plan, run, tmp_path, capsys):
    status, records = run(plan(tuning=TUNING, threshold=1), "--seeds", 0, 1)
    assert status == 0
    assert [(r["row"], r["seed"]) for r in records[:3]] == [("better", 100)] * 3
    assert [r["tuning"] for r in records[:3]] == [
        {"candidate": k, "arguments": ["--ap", ap]} for k, ap in enumerate(("30", "50", "50.0"))
    ]
    common = ["--iterations", "100", "--ap", "20", "--ratio", "4"]
    assert records[0]["arguments"] == [*common, "--ap", "30", "--val", "other"]
    assert (tmp_path / "out/toy/better_tune2/starts").is_file()
    results = [r for r in records[3:] if r["row"] == "better"]
    assert [r["arguments"] for r in results] == [[*common, "--ap", "50"]] * 2
    assert results[0]["tuned"] == {"candidate": 1, "arguments": ["--ap", "50"], "AP": [130.0, 150.0, 150.0]}
    assert not any("tuned" in r or "tuning" in r for r in records[3:] if r["row"] == "student alone")
    table = (tmp_path / "out/table.md").read_text()
    assert "| better | 50.50 (0.71) | 50.00, 51.00 | +40.00 [+40.00, +40.00] | 2 | GO | 4 |" in table
    assert "| better | `--ap 30` | 130.00 |  |" in table and "| better | `--ap 50` | 150.00 | yes |" in table
    assert "with seed 100, on data of their own" in table
    assert run(plan(tuning=TUNING, threshold=1), "--seeds", 0, 1)[1] == records
    assert starts(tmp_path / "out/toy/better_tune0") == ["True"]


def test_an_unfinished_tuning_is_resumed(plan, run, tmp_path, capsys):
    flag = tmp_path / "fail"
    flag.touch()
    rows = {"better": [["--ap", 30], ["--ap", 50, "--fail-if", str(flag)]]}
    path = plan(tuning={**TUNING, "rows": rows})
    status, records = run(path, "--seeds", 0)
    assert status == 1 and [(r["row"], "tuning" in r) for r in records] == [("better", True), ("student alone", False)]
    table = (tmp_path / "out/table.md").read_text()
    assert "| better | `--ap 30` | 130.00 |  |" in table and "| better |  | **failed** (seed 0) |" in table
    err = capsys.readouterr().err
    assert "toy: better, tuning 1 failed: stub: something went wrong" in err
    assert "toy: better, seed 0 failed: its tuning failed" in err
    flag.unlink()
    status, records = run(path, "--seeds", 0)
    assert status == 0 and records[-1]["tuned"]["candidate"] == 1
    assert len(starts(tmp_path / "out/toy/better_tune0")) == 1 and len(starts(tmp_path / "out/toy/better_tune1")) == 2


def test_other_candidates_are_refused(plan, run):
    run(plan(tuning=TUNING), "--seeds", 0)
    other = {"better": [*TUNING["rows"]["better"], ["--ap", 90]]}
    status, records = run(plan(tuning={**TUNING, "rows": other}), "--seeds", 0)
    assert "found a run of toy: better, seed 0 with --iterations 100 --ap 20 --ratio 4 --ap 50, expected" in status
    assert len(records) == 6  # a fourth candidate was tried, and is better than the one that the results have


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_row_can_use_the_run_of_another_of_its_seed(plan, run, tmp_path, jobs):
    rows = {"student alone": [], "second teacher": [], "from it": ["--teacher", "{row:second teacher}"]}
    path = plan(rows=rows, seeds=[0, 1])
    status, records = run(path, "--jobs", jobs)
    assert status == 0 and len(records) == 6
    assert [r["arguments"][-1] for r in records if r["row"] == "from it"] == ["{row:second teacher}"] * 2
    setting = compare.read_plan(path)[0]
    student = next(r for r in compare.runs_of(setting, tmp_path)[2] if (r.row, r.seed) == ("from it", 1))
    options = student.options()
    assert options[options.index("--teacher") + 1] == str(tmp_path / "toy/second_teacher_seed1")


def test_without_the_run_that_it_needs_there_is_none(plan, run, tmp_path, capsys):
    (tmp_path / "fault").touch()
    rows = {"second teacher": ["--fail-if", str(tmp_path / "fault")], "from it": ["--teacher", "{row:second teacher}"]}
    status, records = run(plan(rows=rows, seeds=[0]), "--jobs", 2)
    assert status == 1 and records == []
    assert "from it, seed 0 failed: a run that it needs failed: toy: second teacher, seed 0" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [{"from it": ["{row:second}"], "second": []}, {"a": ["{row:a}"]}, {"a": ["{row:b}"]}])
def test_only_earlier_rows_can_be_used(plan, rows):
    with pytest.raises(ConfigError, match="a row above"):
        compare.read_plan(plan(rows=rows))
