"""Plans: those of the repository and of the documentation, and bad ones."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from acam_kd import cli, compare
from acam_kd.core.errors import ConfigError

from .conftest import ROOT, TUNING


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
