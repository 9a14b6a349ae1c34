"""The comparison: statistics, table, and a tool that survives being killed. The runs are made by a stub."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from acam_kd import cli, compare
from acam_kd.compare.records import best
from acam_kd.core.errors import ConfigError, RunError
from acam_kd.lock import Lock
from acam_kd.report.comparison import Panel, check_equal, differences, plot, section
from acam_kd.report.interval import half_width, t_quantile, verdict

STUB = [sys.executable, str(Path(__file__).parent / "compare_stub.py")]
ROOT = Path(__file__).resolve().parent.parent


def record(row, seed, ap, **more):
    base = {"iterations": 100, "versions": {"torch": "2"}, "seconds_per_step": 0.5, "peak_rss_gib": 1.0}
    return {"row": row, "seed": seed, "metrics": {"AP": ap, "AP50": 2 * ap}, **base, **more}


def panel(**more):
    """Return the three rows with torchvision of docs/segmentation.md."""
    values = {
        "student alone": (39.50, 34.93, 38.59),
        "mimicking": (44.88, 35.67, 42.05),
        "ACAM-KD": (42.50, 35.83, 44.02),
    }
    records = [record(row, seed, ap) for row, own in values.items() for seed, ap in enumerate(own)]
    content = {"name": "shapes", "records": records, "rows": list(values), "metrics": ["AP", "AP50"]}
    return Panel(**{**content, "control": "student alone", "mimicking": "mimicking", **more})


def test_a_run_without_a_value_stays_in_the_table():
    """COCO has no AP where nothing was detected."""
    records = [record(row, seed, 10.0 + seed) for row in ("student alone", "mimicking", "ACAM-KD") for seed in (0, 1)]
    records[-1] = record("ACAM-KD", 1, math.nan)
    text = section(panel(records=records))
    line = next(line for line in text.splitlines() if line.startswith("| ACAM-KD"))
    assert line.startswith("| ACAM-KD | nan |") and "10.00, nan" in line
    assert "with a value to say: ACAM-KD" in text and "| mimicking | 10.50 (0.71) |" in text


def test_runs_on_other_devices_are_no_comparison():
    records = [record("student alone", 0, 1.0), {**record("mimicking", 0, 2.0), "device": "H200"}]
    with pytest.raises(ConfigError) as error:
        section(panel(records=records))
    assert error.value.argument == "records"
    assert error.value.value.startswith("different devices in shapes: ")
    assert error.value.value.endswith("H200 (mimicking, seed 0)")


# Statistics.


@pytest.mark.parametrize("degrees", [1, 2, 3, 7, 15, 30])
def test_quantiles_by_integrating_the_density(degrees):
    """Half of 95% lies between 0 and the quantile. For t = sqrt(n) tan(a) the density is cos^(n-1)."""
    angle = np.arctan(t_quantile(degrees) / np.sqrt(degrees))

    def integral(end):
        middle = (np.arange(200000) + 0.5) / 200000 * end
        return (np.cos(middle) ** (degrees - 1)).sum() * end / 200000

    assert integral(angle) / integral(np.pi / 2) == pytest.approx(0.95, abs=2e-5)


def test_quantiles_fall_to_the_normal_ones():
    found = [t_quantile(n) for n in range(1, 33)]
    assert found[:31] == sorted(found[:31], reverse=True) and found[30] == found[31] == 1.96
    with pytest.raises(ValueError, match="0 degrees"):
        t_quantile(0)


def test_interval_by_hand():
    """The deviation of 1, 2, 3 is 1, so the result is 4.3027 / sqrt(3)."""
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(2.48416, abs=1e-4)
    assert half_width([5.0]) is None and half_width([]) is None


@pytest.mark.parametrize(
    ("values", "threshold", "expected"),
    [  # the half width of 1, 2, 3 is 2.4842, that of three equal values 0
        ((3.0, 4.0, 5.0), 1.0, "GO"),
        ((3.0, 4.0, 5.0), 4.0, "GO"),  # the mean is exactly the threshold
        ((3.0, 4.0, 5.0), 4.1, "INCONCLUSIVE"),  # surely a gain, but perhaps a smaller one
        ((3.0, 4.0, 5.0), 6.5, "NO-GO"),  # surely a gain, surely a smaller one: up to 6.484
        ((1.0, 2.0, 3.0), 1.0, "INCONCLUSIVE"),  # the lower bound is below 0
        ((-3.0, -2.0, -1.0), 1.0, "NO-GO"),  # the upper bound is 0.484
        ((-3.0, -2.0, -1.0), 0.4, "INCONCLUSIVE"),
        ((0.0, 0.0), 0.0, "INCONCLUSIVE"),  # the lower bound is exactly 0, and so is the upper one
        ((0.0, 0.0), 0.5, "NO-GO"),
        ((1.0, 1.0), 1.0, "GO"),  # no width, both bounds are exactly the threshold
        ((1.0, 1.0), 1.5, "NO-GO"),
        ((9.0,), 1.0, "INCONCLUSIVE"),
        ((), 1.0, "INCONCLUSIVE"),
        ((9.0, 9.0, math.nan), 1.0, "INCONCLUSIVE"),
    ],
)
def test_verdicts_by_hand(values, threshold, expected):
    assert verdict(values, threshold) == expected


def test_the_lower_bound_must_be_above_zero():
    """The half width of d, 0, -d around their mean m is 2.4842 d, so at m = 2.4842 d the lower bound is 0."""
    half = half_width([1.0, 0.0, -1.0])
    for mean, expected in ((half * (1 - 1e-9), "INCONCLUSIVE"), (half * (1 + 1e-9), "GO")):
        assert verdict([mean + 1, mean, mean - 1], 1.0) == expected


def test_the_best_candidate():
    def tried(*values):
        return [{"metrics": {"AP": v}, "tuning": {"candidate": k, "arguments": []}} for k, v in enumerate(values)]

    assert best(tried(1.0, 3.0, 2.0), "AP") == 1
    assert best(tried(1.0, 3.0, 3.0)[::-1], "AP") == 1
    assert best(tried(math.nan, -1.0, math.inf), "AP") == 1
    assert best(tried(math.nan, math.nan)[::-1], "AP") == 0


def test_differences_are_paired_by_common_seeds():
    records = [record("a", 2, 5.0), record("a", 0, 1.0), record("b", 2, 3.0), record("b", 1, 100.0)]
    assert differences(panel(records=records, rows=["a", "b"]), "a", "b") == [2.0]


# The table.


def test_table():
    text = section(panel())
    rows = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in text.splitlines() if "|" in line
    }
    assert rows["row"] == [
        *("row", "AP, mean (std)", "AP50", "AP per seed", "minus student alone, 95%"),
        *("distillation/task", "s/step", "peak GiB of the process"),
    ]
    assert rows["ACAM-KD"][:5] == [
        *("ACAM-KD", "40.78 (4.36)", "81.57 (8.71)", "42.50, 35.83, 44.02", "+3.11 [-2.52, +8.74]")
    ]
    assert rows["student alone"][4] == ""
    assert "There is no row for inheritance alone" in text
    assert "Not better than mimicking (it is not above 0): ACAM-KD -0.08 [-5.51, +5.35]." in text
    assert "100 iterations a run, 3 seeds a row." in text


def test_what_beats_mimicking_is_said():
    records = [*panel().records, *(record("new", s, ap) for s, ap in enumerate((45.88, 36.77, 43.05)))]
    text = section(panel(records=records, rows=[*panel().rows, "new"]))
    assert "Better than mimicking (the 95% interval is above 0): new +1.03 [+0.89, +1.18]." in text


def test_verdicts_in_the_table():
    records = [*panel().records, *(record("sure", s, ap) for s, ap in enumerate((41.5, 37.0, 40.6)))]
    records += [record("sure", 7, 1.0), record("once", 0, 80.0), record("teacher", 0, 57.4)]
    text = section(panel(records=records, rows=[*panel().rows, "sure", "once"], threshold=2.0))
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in text.splitlines()}
    assert cells["row"][4:7] == ["minus student alone, 95%", "n", "verdict"]
    assert cells["ACAM-KD"][4:7] == ["+3.11 [-2.52, +8.74]", "3", "INCONCLUSIVE"]
    assert cells["sure"][4:7] == ["+2.03 [+1.93, +2.12]", "3", "GO"]
    assert cells["once"][4:7] == ["+40.50", "1", "INCONCLUSIVE"]
    assert cells["student alone"][4:7] == cells["teacher"][4:7] == ["", "", ""]
    assert "GO: the interval is above 0 and the mean at least 2 more than student alone. NO-GO: " in text
    text = section(panel(records=records, rows=[*panel().rows, "sure"], threshold=6.0, control="mimicking"))
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in text.splitlines()}
    assert cells["row"][4:8] == ["minus mimicking, 95%", "n", "verdict", "minus student alone, 95%"]
    assert cells["ACAM-KD"][4:7] == ["-0.08 [-5.51, +5.35]", "3", "NO-GO"]


def test_one_seed_has_no_interval():
    text = section(panel(records=[r for r in panel().records if r["seed"] == 0]))
    assert "| +3.00 |" in text and "[" not in text.partition("\n\n")[2].partition("\n\n")[0]
    assert (
        "too few common seeds with a value to say: ACAM-KD." in text and "100 iterations a run, 1 seed a row." in text
    )


def test_ratio_teacher_and_failures_are_shown():
    records = [*panel().records, record("teacher", 0, 57.41, iterations=600)]
    records[3] = {**records[3], "distillation_to_task": 0.5}
    text = section(panel(records=records, failed={"ACAM-KD": [4, 3], "student alone": []}))
    assert "| teacher | 57.41 | 114.82 | 57.41 |  |  | 0.5 | 1 |" in text
    assert re.search(r"\| mimicking \|.* \| 0.5 \| 0.5 \| 1 \|", text)
    assert "44.02, **failed** (seed 3), **failed** (seed 4)" in text


def test_unequal_runs_get_no_table():
    records = [*panel().records, record("mimicking", 3, 1.0, iterations=200)]
    with pytest.raises(ConfigError) as error:
        section(panel(records=records))
    assert error.value.argument == "records"
    different = "different iterations in shapes: 100 (student alone, seed 0), 200 (mimicking, seed 3)"
    assert error.value.value == different and error.value.allowed == "the same for all runs that are compared"
    with pytest.raises(ConfigError) as error:
        check_equal(panel(records=[*panel().records, record("mimicking", 3, 1.0, versions={"torch": "3"})]))
    assert error.value.value.startswith("different versions of torch in shapes: 2 ") and ", 3 " in error.value.value


def test_plot_is_a_picture_also_of_nothing():
    full, empty = plot([panel(), panel()]), plot([panel(records=[])])
    assert full.startswith(b"\x89PNG") and empty.startswith(b"\x89PNG") and len(full) > len(empty) > 1000


# Plans.

TUNING = {"seed": 100, "run": ["--val", "other"], "rows": {"better": [["--ap", 30], ["--ap", 50], ["--ap", 50.0]]}}


def parsed(run):
    """Let the parser of ``acam-kd train`` read a run's arguments, and return them."""
    from acam_kd.cli import _parser

    return _parser().parse_args(run.command()[3:])


@pytest.mark.parametrize("path", sorted((ROOT / "configs/compare").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_plans_of_this_repository(path):
    settings = compare.read_plan(path)
    assert path.read_text().startswith("# ")
    runs = [run for setting in settings for phase in compare.runs_of(setting, Path("out")) for run in phase]
    assert len({run.folder for run in runs}) == len(runs)
    for run in runs:
        command = run.command()
        assert not [argument for argument in command if "{" in argument]
        for file in re.findall(r"configs/\S+?\.yaml", " ".join(command)):
            assert (ROOT / file).is_file(), file
        if run.setting.engine == "torchvision":
            parsed(run)


def test_the_plan_of_the_documentation(tmp_path):
    (tmp_path / "plan.yaml").write_text(
        re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/comparison.md").read_text(), re.S)[0]
    )
    (setting,) = compare.read_plan(tmp_path / "plan.yaml")
    (_,), tuning, students = compare.runs_of(setting, Path("out"))
    assert len(tuning) == 5 and len(students) == 18 and setting.threshold == 1
    found = parsed(tuning[3])
    assert found.val == ["mydata/val.json", "mydata/val"] and found.seed == 100
    assert parsed(students[0]).val == ["mydata/test.json", "mydata/test"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "keras"}, "engine: found keras in toy, expected one of torchvision, detectron2"),
        ({"row": {}}, "settings: found row in toy, expected one of the keys engine, run, metrics"),
        ({"rows": {}}, "rows: found nothing in toy, expected a value for each of engine, run, metrics, rows"),
        ({"rows": {"a b": [], "A-b": []}}, "rows: found teacher, a b, A-b in toy, expected names that give each row"),
        ({"rows": {"Teacher": []}}, "rows: found teacher, Teacher in toy, expected names that give each row its own"),
        ({"mimicking": "m"}, "mimicking: found m in toy, expected one of the rows student alone, better"),
        ({"control": "c"}, "control: found c in toy, expected one of the rows student alone, better"),
        (
            {"rows": {"a": []}, "threshold": 1},
            "control: found nothing in toy, expected the row that a threshold refers to",
        ),
        ({"threshold": -1}, "threshold: found -1 in toy, expected a number >= 0, in points of the first metric"),
        ({"threshold": "1"}, "threshold: found 1 in toy, expected a number >= 0"),
        ({"threshold": math.nan}, "threshold: found nan in toy, expected a number >= 0"),
        ({"seeds": [0, -1]}, "seeds: found [0, -1] in toy, expected a list of whole numbers >= 0"),
        ({"seeds": []}, "seeds: found [] in toy, expected a list of whole numbers >= 0"),
        ({"rows": ["a"]}, "rows: found ['a'] in toy, expected keys with values"),
        ({"rows": {"a": "--ap 1"}}, "rows: found --ap 1 in toy, expected a list of arguments"),
        ({"tuning": {**TUNING, "seeds": 1}}, "tuning: found seeds in toy, expected seed, run and rows"),
        ({"tuning": {**TUNING, "run": []}}, "tuning: found no run in toy, expected seed, run and rows"),
        ({"tuning": {**TUNING, "rows": {"x": [[], []]}}}, "tuning: found x in toy, expected one of the rows student"),
        (
            {"tuning": {**TUNING, "rows": {"better": [[]]}}},
            "tuning: found [[]] for better in toy, expected two or more",
        ),
        ({"tuning": {**TUNING, "seed": 2}}, "seed: found 2 for tuning and for results in toy, expected a seed that no"),
    ],
)
def test_bad_plans_are_one_line(plan, tmp_path, change, message):
    with pytest.raises(SystemExit) as error:
        cli.main(["compare", "--plan", str(plan(**change)), "--output", str(tmp_path / "out")])
    assert str(error.value.code).startswith(f"acam-kd: {message}") and "\n" not in str(error.value.code)


def test_a_file_that_is_no_plan(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("student alone: []")
    with pytest.raises(ConfigError) as error:
        compare.read_plan(path)
    assert (error.value.argument, error.value.value) == ("plan", f"{path} without settings")
    path.write_text("settings: {a b: {}, a-b: {}}")
    with pytest.raises(ConfigError) as error:
        compare.read_plan(path)
    assert (error.value.argument, error.value.value) == ("settings", f"a b, a-b in {path}")
    path.write_text("seed: [0]\nsettings: {}")
    with pytest.raises(ConfigError) as error:
        compare.read_plan(path)
    assert (error.value.argument, error.value.value) == ("plan", f"seed in {path}")


@pytest.mark.parametrize("content", [None, "settings: [", b"\xff"])
def test_a_plan_that_cannot_be_read_is_one_line(tmp_path, content):
    path = tmp_path / "plan.yaml"
    if content:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as error:
        cli.main(["compare", "--plan", str(path), "--output", str(tmp_path / "out")])
    message = str(error.value.code)
    assert message.startswith(f"acam-kd: --plan: found {path}, which cannot be read (") and "\n" not in message


# The tool.


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Return a function that writes a plan of two rows, whose runs are the stub's."""
    monkeypatch.setitem(compare.COMMANDS, "torchvision", STUB)

    def write(**change):
        content = {
            "engine": "torchvision",
            "run": ["--iterations", 100],
            "metrics": ["AP"],
            "rows": {"student alone": [], "better": ["--ap", 20, "--ratio", 4]},
            **change,
        }
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump({"settings": {"toy": content}}, sort_keys=False))
        return path

    return write


@pytest.fixture
def run(tmp_path):
    """Return a function that runs the tool and returns its status and its records."""

    def call(plan, *more):
        before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
        status = 0
        try:
            cli.main(["compare", "--plan", str(plan), "--output", str(tmp_path / "out"), *map(str, more)])
        except SystemExit as stop:
            status = stop.code
        assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
        path = tmp_path / "out/results.jsonl"
        return status, [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    return call


def starts(folder):
    return (folder / "starts").read_text().splitlines()


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


# Tuning.


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


def test_unequal_iterations_are_refused(plan, run, tmp_path, capsys):
    rows = {"student alone": [], "longer": ["--iterations", 200]}
    status, records = run(plan(rows=rows), "--seeds", 0)
    assert status == 1 and len(records) == 2
    different = "different iterations in toy: 100 (student alone, seed 0), 200 (longer, seed 0)"
    line = f"records: found {different}, expected the same for all runs that are compared"
    assert capsys.readouterr().err.strip() == f"acam-kd: {line}"
    assert "|" not in (tmp_path / "out/table.md").read_text()
    assert run(plan(rows=rows), "--seeds", 0, 1)[0] == f"acam-kd: {line}"  # at once


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


def started(plan, tmp_path, *more):
    """Start the tool as a process of its own, and wait until its slow run has started."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import runpy\nfrom acam_kd import compare\ncompare.COMMANDS['torchvision'] = {STUB!r}\n"
        "runpy.run_module('acam_kd.cli', run_name='__main__')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "projects"), str(ROOT)])}
    command = [
        sys.executable,
        str(driver),
        "compare",
        "--plan",
        str(plan),
        "--output",
        str(tmp_path / "out"),
        "--seeds",
        "0",
        *more,
    ]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (tmp_path / "out/toy/slow_seed0/starts").is_file():
        assert time.monotonic() < until and process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process


def alive(pattern):
    """Return whether a process has this pattern in its command line."""
    commands = (path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists())
    return any(pattern.encode() in command for command in commands)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end_it_ends_its_runs_and_goes_on_later(plan, run, tmp_path, number):
    path = plan(rows={"student alone": [], "slow": ["--wait-for", str(tmp_path / "go")]})
    process = started(path, tmp_path)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1 and err.strip() == "acam-kd: interrupted; the same command resumes it"
    assert not alive(str(tmp_path / "go"))
    (tmp_path / "go").touch()
    status, records = run(path, "--seeds", 0)
    assert status == 0 and [r["row"] for r in records] == ["student alone", "slow"]
    assert len(starts(tmp_path / "out/toy/student_alone_seed0")) == 1
    assert len(starts(tmp_path / "out/toy/slow_seed0")) == 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at /proc")
def test_killed_it_leaves_its_run_alone_and_waits_for_it_later(plan, run, tmp_path, capsys):
    path = plan(rows={"slow": ["--wait-for", str(tmp_path / "go")], "student alone": []})
    process = started(path, tmp_path)
    process.kill()
    process.communicate()
    assert alive(str(tmp_path / "go"))
    again = started(path, tmp_path)
    assert "waiting for the process" in again.stdout.readline()
    assert len(starts(tmp_path / "out/toy/slow_seed0")) == 1
    (tmp_path / "go").touch()
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, (out, err)
    _, records = run(path, "--seeds", 0)
    assert [r["row"] for r in records] == ["slow", "student alone"]
    assert records[0]["peak_rss_gib"] is None and records[1]["peak_rss_gib"] > 0
