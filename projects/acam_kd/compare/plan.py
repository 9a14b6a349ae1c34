"""The plan of a comparison, and the command of each of its runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..core.errors import ConfigError
from ..report.comparison import TEACHER

__all__ = ["COMMANDS", "ROOT", "Run", "Setting", "read_plan", "runs_of"]

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = {
    "torchvision": [sys.executable, "-m", "acam_kd.cli", "train"],
    "detectron2": [sys.executable, "-m", "acam_kd.d2.train"],
}
FINAL = {"torchvision": "result.json", "detectron2": "model_final.pth"}
"""Engine -> the file that a run's folder gets when training is complete."""
FIRST_SEED = 0
"""The seed of every teacher."""


def slug(name: str) -> str:
    """Turn a name into a part of a path."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


@dataclass(frozen=True)
class Setting:
    """Engine, pair and data of a comparison, and its rows.

    Args:
        name: the setting's name.
        engine: a key of ``COMMANDS``.
        run: arguments of every student's run; ``{teacher}`` stands for the folder of the teacher's run.
        metrics: names as in the engine's results; the first is compared.
        rows: the name of a row -> its additional arguments.
        teacher: arguments of the teacher's run, which comes first; empty for no teacher.
        student_alone, inheritance_alone: the rows that the others are compared with.
        mimicking: the row that every method should beat; empty for no such row.
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
            ConfigError: a key is unknown or missing, or its value cannot be used.
        """
        known, needed = list(cls.__dataclass_fields__)[1:], ("engine", "run", "metrics", "rows")
        unknown = [key for key in content if key not in known]
        if unknown:
            raise ConfigError("settings", f"{unknown[0]} in {name}", allowed=f"one of the keys {', '.join(known)}")
        for key in needed:
            if not content.get(key):
                raise ConfigError(key, f"nothing in {name}", allowed=f"a value for each of {', '.join(needed)}")
        values = dict(content)
        for key in ("run", "metrics", "teacher"):
            values[key] = tuple(map(str, content.get(key) or ()))
        values["rows"] = {row: tuple(map(str, more or ())) for row, more in content["rows"].items()}
        if values["engine"] not in COMMANDS:
            raise ConfigError("engine", f"{values['engine']} in {name}", allowed=f"one of {', '.join(COMMANDS)}")
        _check_rows(name, values)
        return cls(name, **values)


def _check_rows(name: str, values: Mapping[str, Any]) -> None:
    rows = values["rows"]
    if len({slug(row) for row in (*rows, TEACHER)}) < len(rows) + 1:
        listed = ", ".join((TEACHER, *rows))
        raise ConfigError("rows", f"{listed} in {name}", allowed="names that give each row its own folder")
    for key in ("student_alone", "inheritance_alone", "mimicking"):
        if values.get(key) and values[key] not in rows:
            raise ConfigError(key, f"{values[key]} in {name}", allowed=f"one of the rows {', '.join(rows)}")


def read_plan(path: str | Path) -> list[Setting]:
    """Read the settings of a plan, a YAML file.

    Raises:
        ConfigError: the file cannot be read, or is not a plan.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError("plan", f"{path}, which cannot be read ({reason})", allowed="a YAML file") from error
    settings = content.get("settings") if isinstance(content, dict) else None
    if not isinstance(settings, dict) or not all(isinstance(entry, dict) for entry in settings.values()):
        raise ConfigError("plan", f"{path} without settings", allowed="'settings:' with a name and keys for each")
    if len({slug(name) for name in settings}) < len(settings):
        listed = ", ".join(settings)
        raise ConfigError("settings", f"{listed} in {path}", allowed="names that give each setting its own folder")
    return [Setting.of(name, entry) for name, entry in settings.items()]


@dataclass(frozen=True, eq=False)
class Run:
    """One run: a setting, a row, a seed, and its folder."""

    setting: Setting
    row: str
    seed: int
    output: Path
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        part = TEACHER if self.row == TEACHER else f"{slug(self.row)}_seed{self.seed}"
        object.__setattr__(self, "folder", self.output / slug(self.setting.name) / part)

    @property
    def key(self) -> tuple[str, str, int]:
        """The setting, row and seed that a record is found by."""
        return self.setting.name, self.row, self.seed

    @property
    def trained(self) -> bool:
        """True if training is complete, though perhaps not the evaluation."""
        return (self.folder / FINAL[self.setting.engine]).is_file()

    @property
    def arguments(self) -> list[str]:
        """The arguments as in the plan, without paths of one machine, so that a record can be read elsewhere."""
        setting = self.setting
        return list(setting.teacher if self.row == TEACHER else (*setting.run, *setting.rows[self.row]))

    def options(self) -> list[str]:
        """Return the arguments of its process, after the program's name."""
        teacher = str(self.output / slug(self.setting.name) / TEACHER)
        arguments = [argument.replace("{teacher}", teacher) for argument in self.arguments]
        if self.setting.engine == "detectron2":
            return ["--resume", *arguments, "SEED", str(self.seed), "OUTPUT_DIR", str(self.folder)]
        return [*arguments, "--seed", str(self.seed), "--output", str(self.folder), "--resume"]

    def command(self) -> list[str]:
        """Return the command of the process that starts or resumes it."""
        return [*COMMANDS[self.setting.engine], *self.options()]

    def __str__(self) -> str:
        return f"{self.setting.name}: {self.row}, seed {self.seed}"


def runs_of(settings: Sequence[Setting], seeds: Sequence[int], output: Path) -> tuple[list[Run], list[Run]]:
    """List the teachers' runs, and the students' runs seed after seed."""
    teachers = [Run(setting, TEACHER, FIRST_SEED, output) for setting in settings if setting.teacher]
    students = [Run(s, row, seed, output) for seed in seeds for s in settings for row in s.rows]
    return teachers, students
