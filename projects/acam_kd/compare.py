"""The plan of a comparison, the command of each of its runs, and what a finished run left, in either engine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from .vis.comparison import TEACHER

__all__ = ["COMMANDS", "Run", "Setting", "about", "read_plan", "read_records", "read_run", "runs_of", "threads_of"]

ROOT = Path(__file__).resolve().parent.parent.parent
COMMANDS = {
    "torchvision": [sys.executable, "-m", "acam_kd.cli", "train"],
    "detectron2": [sys.executable, str(ROOT / "train_net.py")],
}
FINAL = {"torchvision": "result.json", "detectron2": "model_final.pth"}
"""What a run's folder gets when there is nothing left to train."""
RATIO = "distill/distillation_to_task"
NO_METRICS = ("step", "iteration", "seconds", "eta_seconds")
FIRST_SEED = 0
"""Of every teacher."""


def slug(name: str) -> str:
    """A name as a part of a path."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


@dataclass(frozen=True)
class Setting:
    """Engine, pair and data, and the rows to compare there.

    Args:
        name: of the setting.
        engine: a key of ``COMMANDS``.
        run: arguments of every student's run; ``{teacher}`` stands for the folder of the teacher's run.
        metrics: names as in the engine's results; the first is compared.
        rows: name -> more arguments.
        teacher: arguments of the teacher's run, which is made first; empty for none.
        student_alone, inheritance_alone: the rows that the others are compared with.
        mimicking: the row that every method should beat; empty for none.
    """

    name: str
    engine: str
    run: tuple[str, ...]
    metrics: tuple[str, ...]
    rows: Mapping[str, tuple[str, ...]]
    teacher: tuple[str, ...] = ()
    student_alone: str = "student alone"
    inheritance_alone: str = "inheritance alone"
    mimicking: str = ""

    @classmethod
    def of(cls, name: str, content: Mapping[str, Any]) -> Setting:
        """Read a setting of a plan.

        Raises:
            ValueError: a key is unknown, missing, or its value is of no use.
        """
        known, needed = list(cls.__dataclass_fields__)[1:], ("engine", "run", "metrics", "rows")
        wrong = [key for key in content if key not in known] + [key for key in needed if not content.get(key)]
        if wrong:
            raise ValueError(
                f"setting {name!r}: {wrong[0]!r} is unknown, missing or empty; known: {', '.join(known)}; "
                f"needed: {', '.join(needed)}"
            )
        values = dict(content)
        for key in ("run", "metrics", "teacher"):
            values[key] = tuple(map(str, content.get(key) or ()))
        values["rows"] = {row: tuple(map(str, more or ())) for row, more in content["rows"].items()}
        if values["engine"] not in COMMANDS:
            raise ValueError(f"setting {name!r}: engine must be one of {', '.join(COMMANDS)}, not {values['engine']!r}")
        _check_rows(name, values)
        return cls(name, **values)


def _check_rows(name: str, values: Mapping[str, Any]) -> None:
    rows = values["rows"]
    if len({slug(row) for row in (*rows, TEACHER)}) < len(rows) + 1:
        raise ValueError(f"setting {name!r}: two rows would share a folder: {', '.join((TEACHER, *rows))}")
    for key in ("student_alone", "inheritance_alone", "mimicking"):
        if values.get(key) and values[key] not in rows:
            raise ValueError(f"setting {name!r}: {key} is {values[key]!r}, which is no row: {', '.join(rows)}")


def read_plan(path: str | Path) -> list[Setting]:
    """The settings of a plan, a YAML file.

    Raises:
        ValueError: it is not a plan.
    """
    content = yaml.safe_load(Path(path).read_text())
    settings = content.get("settings") if isinstance(content, dict) else None
    if not isinstance(settings, dict) or not all(isinstance(own, dict) for own in settings.values()):
        raise ValueError(f"{path} is no plan: it has no 'settings:' with a name each")
    if len({slug(name) for name in settings}) < len(settings):
        raise ValueError(f"{path}: two settings would share a folder: {', '.join(settings)}")
    return [Setting.of(name, own) for name, own in settings.items()]


@dataclass(frozen=True, eq=False)
class Run:
    """One run: a setting, a row, a seed, and its folder."""

    setting: Setting
    row: str
    seed: int
    output: Path
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        own = TEACHER if self.row == TEACHER else f"{slug(self.row)}_seed{self.seed}"
        object.__setattr__(self, "folder", self.output / slug(self.setting.name) / own)

    @property
    def key(self) -> tuple[str, str, int]:
        """What a record is found by."""
        return self.setting.name, self.row, self.seed

    @property
    def trained(self) -> bool:
        """Whether nothing is left to train, though perhaps to evaluate."""
        return (self.folder / FINAL[self.setting.engine]).is_file()

    @property
    def arguments(self) -> list[str]:
        """As in the plan; without what is of one machine, so that a record can be read elsewhere."""
        setting = self.setting
        return list(setting.teacher if self.row == TEACHER else (*setting.run, *setting.rows[self.row]))

    def command(self) -> list[str]:
        """The process that makes it, or goes on with it."""
        teacher = str(self.output / slug(self.setting.name) / TEACHER)
        arguments = [argument.replace("{teacher}", teacher) for argument in self.arguments]
        if self.setting.engine == "detectron2":
            end = ["SEED", str(self.seed), "OUTPUT_DIR", str(self.folder)]
            return [*COMMANDS["detectron2"], "--resume", *arguments, *end]
        end = ["--seed", str(self.seed), "--output", str(self.folder), "--resume"]
        return [*COMMANDS[self.setting.engine], *arguments, *end]

    def __str__(self) -> str:
        return f"{self.setting.name}: {self.row}, seed {self.seed}"


def runs_of(settings: Sequence[Setting], seeds: Sequence[int], output: Path) -> tuple[list[Run], list[Run]]:
    """The teachers' runs, and the students', seed after seed."""
    teachers = [Run(setting, TEACHER, FIRST_SEED, output) for setting in settings if setting.teacher]
    students = [Run(s, row, seed, output) for seed in seeds for s in settings for row in s.rows]
    return teachers, students


def about(threads: int) -> dict[str, Any]:
    """What a run that starts now is made with."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "detectron2"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*", "--abbrev=12"]
    try:
        found = subprocess.run(git, capture_output=True, text=True)
        versions["commit"] = found.stdout.strip() or None
    except OSError:  # no git
        versions["commit"] = None
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"date": date, "versions": versions, "threads": threads}


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a comparison; a last line of which a killed process wrote a part is left out.

    Raises:
        ValueError: another line is no record.
    """
    records = []
    lines = path.read_text().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}, is no record: remove it, its run is read again") from None
    return records


def read_run(run: Run, known: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a complete run, out of its folder.

    Args:
        run: the run.
        known: what ``about`` said when it started, and ``peak_rss_gib``, None if nobody saw it.

    Raises:
        ValueError: a metric of the plan is not there.
    """
    read: Callable[[Path], dict[str, Any]] = READERS[run.setting.engine]
    found = read(run.folder)
    history = found.pop("history")
    found["metrics"] = {name: value for name, value in found["metrics"].items() if name not in NO_METRICS}
    ratios = {line["step"]: line[RATIO] for line in history if RATIO in line}  # the last of a repeated step
    missing = [name for name in run.setting.metrics if name not in found["metrics"]]
    if missing:
        names = [name for name in found["metrics"] if not name.startswith(("distill/", "loss"))]
        raise ValueError(f"it has no metric {missing[0]!r} (key: metrics); it has {', '.join(names)}")
    return {
        "setting": run.setting.name,
        "engine": run.setting.engine,
        "row": run.row,
        "seed": run.seed,
        "arguments": run.arguments,
        **found,
        "distillation_to_task": statistics.mean(ratios.values()) if ratios else None,
        **{key: known.get(key) for key in ("peak_rss_gib", "date", "versions", "threads")},
    }


def _read_torchvision(folder: Path) -> dict[str, Any]:
    result = json.loads((folder / "result.json").read_text())
    iterations = json.loads((folder / "settings.json").read_text())["iterations"]
    history = _lines(folder / "metrics.jsonl")
    times = [(line["step"], line["seconds"]) for line in history if "seconds" in line]
    steps = [(t - s) / (j - i) for (i, s), (j, t) in zip(times, times[1:]) if j > i]
    return {
        "iterations": iterations,
        "metrics": {name: value for line in (*history, result["metrics"]) for name, value in line.items()},
        "seconds_per_step": statistics.median(steps) if steps else result["seconds"] / iterations,
        "seconds_per_step_is": "median" if steps else "total",
        "device": result["device"],
        "history": history,
    }


def _read_detectron2(folder: Path) -> dict[str, Any]:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    history = [{"step": line["iteration"], **line} for line in _lines(folder / "metrics.json") if "iteration" in line]
    if not history or history[-1]["iteration"] + 1 < config["SOLVER"]["MAX_ITER"]:
        raise ValueError(f"its metrics end before SOLVER.MAX_ITER {config['SOLVER']['MAX_ITER']}")
    steps = [line["time"] for line in history if "time" in line]
    gpu = re.search(r"^GPU [\d,]+ +(.+?)(?: \(arch=.*)?$", _text(folder / "log.txt"), re.MULTILINE)
    device = "CPU" if config["MODEL"]["DEVICE"] == "cpu" else gpu[1] if gpu else config["MODEL"]["DEVICE"]
    return {
        "iterations": config["SOLVER"]["MAX_ITER"],
        "metrics": {name: value for line in history for name, value in line.items()},
        "seconds_per_step": statistics.median(steps) if steps else None,
        "seconds_per_step_is": "median",
        "device": device,
        "history": history,
    }


READERS = {"torchvision": _read_torchvision, "detectron2": _read_detectron2}


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a killed run may have left half a line, anywhere if it was resumed."""
    found = []
    for line in _text(path).splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def threads_of(environment: Mapping[str, str]) -> int:
    """How many threads torch takes in a process with this environment."""
    return int(environment.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
