"""The tool: its runs, records and tables, what it refuses, and runs that fail."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import yaml

from acam_kd import compare
from acam_kd.core.errors import RunError
from acam_kd.lock import Lock

from .conftest import TUNING, starts


def test_records_table_and_plot(plan, run, tmp_path, capsys):
    status, records = run(plan(), "--seeds", 0, 1)
    assert status == 0
    assert [(r["row"], r["seed"]) for r in records] == [(r, s) for s in (0, 1) for r in ("student alone", "better")]
    found = records[1]
    assert found["setting"] == "toy" and found["engine"] == "torchvision" and found["iterations"] == 100
    assert found["arguments"] == ["--iterations", "100", "--ap", "20", "--ratio", "4"]
    assert found["metrics"]["AP"] == 20 and found["distillation_to_task"] == pytest.approx((2 + 6) / 2)
    assert records[0]["distillation_to_task"] is None
    assert (found["seconds_per_step"], found["seconds_per_step_is"]) == (0.2, "median")
    assert (
        0.001 < found["peak_rss_gib"] < 100 and found["device"] == "CPU" and found["threads"] >= 1
    )  # at least the tests' own
    assert set(found["versions"]) == {"python", "torch", "torchvision", "detectron2", "commit"}
    assert found["versions"]["torch"] and found["versions"]["python"] and found["date"]
    assert str(tmp_path) not in json.dumps(records)
    table = (tmp_path / "out/table.md").read_text()
    assert "| better | 20.50 (0.71) | 20.00, 21.00 | +10.00 [+10.00, +10.00] | 4 | 0.2 |" in table
    assert table in capsys.readouterr().out
    assert (tmp_path / "out/plot.png").read_bytes().startswith(b"\x89PNG")


def test_confusions_are_added_up_over_the_seeds(plan, run, tmp_path, monkeypatch):
    drawn = []

    def draw(rows, names):
        drawn.append(({row: counts.tolist() for row, counts in rows.items()}, names))
        return b"picture"

    monkeypatch.setattr("acam_kd.compare.confusions.draw_confusions", draw)
    classes = ["--classes", "ant", "bee"]
    path = plan(teacher=classes, rows={"student alone": classes, "better": ["--ap", 20, *classes], "boxes": []})
    assert run(path, "--seeds", 0, 1)[0] == 0
    twice = [[2, 0], [2, 0]]
    assert drawn == [({"teacher": [[1, 0], [1, 0]], "student alone": twice, "better": twice}, ("ant", "bee"))]
    assert "(confusion_toy.png)" in (tmp_path / "out/table.md").read_text()
    assert (tmp_path / "out/confusion_toy.png").read_bytes() == b"picture"
    (tmp_path / "out/toy/better_seed1/predictions.json").write_text("[{")  # damaged: the others stay
    assert run(path, "--seeds", 0, 1)[0] == 0 and drawn[-1][0]["better"] == [[1, 0], [1, 0]]


def test_what_is_there_is_not_run_again_and_more_seeds_are_added(plan, run, tmp_path):
    run(plan(), "--seeds", 0)
    status, records = run(plan(), "--seeds", 0, 1)
    assert status == 0 and len(records) == 4
    assert starts(tmp_path / "out/toy/better_seed0") == ["True"]
    assert (tmp_path / "out/table.md").read_text().count("10.00, 11.00") == 1


def test_other_arguments_are_refused(plan, run):
    run(plan(), "--seeds", 0)
    status, _ = run(plan(rows={"student alone": ["--ap", 12]}), "--seeds", 0)
    assert status == (
        "acam-kd: --output: found a run of toy: student alone, seed 0 with --iterations 100, expected "
        "--iterations 100 --ap 12, as in the plan; choose another --output"
    )


def test_seeds_of_command_setting_and_plan(plan, tmp_path):
    path = plan(seeds=[5, 3, 5])
    (setting,) = compare.read_plan(path)
    assert setting.seeds == (5, 3) and setting.control == "student alone"
    assert compare.read_plan(path, [7, 0])[0].seeds == (7, 0)
    assert compare.read_plan(plan())[0].seeds == (0, 1, 2)
    content = yaml.safe_load(path.read_text())
    content["settings"]["more"] = {**content["settings"]["toy"], "seeds": [9]}
    path.write_text(yaml.safe_dump({"seeds": [4], **content}, sort_keys=False))
    assert [setting.seeds for setting in compare.read_plan(path)] == [(4,), (9,)]


def test_settings_come_one_after_the_other(plan, run):
    path = plan(teacher=[])
    toy = yaml.safe_load(path.read_text())["settings"]["toy"]
    more = {**toy, "teacher": ["--ap", 50], "rows": {"alone": []}}
    path.write_text(yaml.safe_dump({"seeds": [1, 0], "settings": {"toy": toy, "more": more}}, sort_keys=False))
    _, records = run(path)
    assert [(r["setting"], r["row"], r["seed"]) for r in records] == [
        *(("toy", "student alone", 1), ("toy", "better", 1), ("toy", "student alone", 0), ("toy", "better", 0)),
        *(("more", "teacher", 0), ("more", "alone", 1), ("more", "alone", 0)),
    ]


def test_tables_from_records_alone(plan, run, tmp_path):
    path = plan(tuning=TUNING, teacher=["--ap", 60], threshold=1)
    _, before = run(path, "--seeds", 0, 1)
    tables = (tmp_path / "out/table.md").read_text()
    for each in (tmp_path / "out").iterdir():
        if each.name != "results.jsonl":
            shutil.rmtree(each) if each.is_dir() else each.unlink()
    assert run(path, "--seeds", 0, 1) == (0, before)
    assert (tmp_path / "out/table.md").read_text() == tables and not (tmp_path / "out/toy").exists()


def test_a_later_plan_adds_rows(plan, run, tmp_path):
    run(plan(), "--seeds", 0, 1)
    status, records = run(plan(rows={"student alone": [], "other": ["--ap", 15]}), "--seeds", 0)
    assert status == 0 and [r["row"] for r in records][4:] == ["other"]
    table = (tmp_path / "out/table.md").read_text()
    assert "| student alone | 10.50 (0.71) |" in table and "| other | 15.00 |" in table and "better" not in table


def test_half_a_line_is_made_again_out_of_the_folder(plan, run, tmp_path):
    _, before = run(plan(), "--seeds", 0)
    path = tmp_path / "out/results.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    status, records = run(plan(), "--seeds", 0)
    assert status == 0 and records == before
    assert starts(tmp_path / "out/toy/better_seed0") == ["True"]
    path.write_text("{\n" + path.read_text())
    with pytest.raises(RunError) as error:
        compare.read_records(path)
    assert (error.value.what, error.value.where) == ("this line is no record", f"{path}, line 1")


def test_rows_of_other_lengths_stand_in_one_table(plan, run, tmp_path):
    rows = {"student alone": [], "longer": ["--iterations", 200]}
    assert run(plan(rows=rows), "--seeds", 0)[0] == 0
    assert "100 to 200 iterations a run, 1 seed a row." in (tmp_path / "out/table.md").read_text()


def test_unequal_iterations_of_a_row_are_refused(plan, run, tmp_path, capsys):
    rows = {"student alone": []}
    assert run(plan(rows=rows), "--seeds", 0)[0] == 0
    path = tmp_path / "out/results.jsonl"
    path.write_text(path.read_text().replace('"iterations": 100', '"iterations": 200'))
    status, records = run(plan(rows=rows), "--seeds", 0, 1)
    assert status == 1 and [r["iterations"] for r in records] == [200, 100]
    different = "different iterations in toy: 200 (student alone, seed 0), 100 (student alone, seed 1)"
    line = f"records: found {different}, expected the same for all runs of a row"
    assert capsys.readouterr().err.strip() == f"acam-kd: {line}"
    assert "|" not in (tmp_path / "out/table.md").read_text()
    assert run(plan(rows=rows), "--seeds", 0, 1)[0] == f"acam-kd: {line}"  # at once


def test_a_failed_run_stops_no_other_and_is_tried_again(plan, run, tmp_path, capsys):
    flag = tmp_path / "fail"
    flag.touch()
    rows = {"broken": ["--fail-if", str(flag)], "student alone": []}
    status, records = run(plan(rows=rows), "--seeds", 0)
    assert status == 1 and [r["row"] for r in records] == ["student alone"]
    assert "toy: broken, seed 0 failed: stub: something went wrong (see " in capsys.readouterr().err
    assert "| broken |  | **failed** (seed 0) |" in (tmp_path / "out/table.md").read_text()
    flag.unlink()
    status, records = run(plan(rows=rows), "--seeds", 0)
    assert status == 0 and len(records) == 2 and "failed" not in (tmp_path / "out/table.md").read_text()


def test_a_metric_that_is_not_there(plan, run, capsys):
    status, _ = run(plan(metrics=["mIoU"]), "--seeds", 0)
    assert status == 1 and "metrics: found mIoU, expected metrics of the run: AP, AP50" in capsys.readouterr().err


def test_the_teacher_comes_first_and_without_it_nothing(plan, run, tmp_path, capsys):
    flag = tmp_path / "fail"
    flag.touch()
    content = {"teacher": ["--iterations", 400, "--ap", 50, "--fail-if", str(flag)], "run": ["--teacher", "{teacher}"]}
    status, records = run(plan(**content), "--seeds", 0, "--jobs", 2)
    assert status == 1 and records == [] and "better, seed 0 failed: its teacher failed" in capsys.readouterr().err
    flag.unlink()
    status, records = run(plan(**content), "--seeds", 0, "--jobs", 2)
    assert status == 0 and [r["row"] for r in records][0] == "teacher" and len(records) == 3
    assert "{teacher}" in records[1]["arguments"]
    assert "| teacher | 50.00 | 50.00 |  |  | 0.2 |" in (tmp_path / "out/table.md").read_text()


def test_several_jobs_share_the_cores(plan, run, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    _, records = run(plan(), "--seeds", 0, "--jobs", 3)
    assert [r["threads"] for r in records] == [2, 2]
    _, records = run(plan(), "--seeds", 0, 1, "--jobs", 1)
    assert [r["threads"] for r in records[2:]] == [8, 8]


def test_two_at_once_are_refused(plan, run, tmp_path):
    with Lock(tmp_path / "out"):
        status, _ = run(plan())
    place, owner = tmp_path / "out", f"process {os.getpid()}"
    assert status.startswith(f"acam-kd: --output: found {place}, in which another run is at work (")
    assert owner in status and status.endswith("; wait for that run, end it, or choose another --output")
