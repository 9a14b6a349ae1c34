"""The plan of a comparison, and the command of each of its runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..vis.comparison import TEACHER

__all__ = ["COMMANDS", "ROOT", "Run", "Setting", "read_plan", "runs_of"]

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = {
    "torchvision": [sys.executable, "-m", "acam_kd.cli", "train"],
    "detectron2": [sys.executable, str(ROOT / "train_net.py")],
}
FINAL = {"torchvision": "result.json", "detectron2": "model_final.pth"}
"""What a run's folder gets when there is nothing left to train."""
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

    def options(self) -> list[str]:
        """Of its process, after the program's name."""
        teacher = str(self.output / slug(self.setting.name) / TEACHER)
        arguments = [argument.replace("{teacher}", teacher) for argument in self.arguments]
        if self.setting.engine == "detectron2":
            return ["--resume", *arguments, "SEED", str(self.seed), "OUTPUT_DIR", str(self.folder)]
        return [*arguments, "--seed", str(self.seed), "--output", str(self.folder), "--resume"]

    def command(self) -> list[str]:
        """The process that makes it, or goes on with it."""
        return [*COMMANDS[self.setting.engine], *self.options()]

    def __str__(self) -> str:
        return f"{self.setting.name}: {self.row}, seed {self.seed}"


def runs_of(settings: Sequence[Setting], seeds: Sequence[int], output: Path) -> tuple[list[Run], list[Run]]:
    """The teachers' runs, and the students', seed after seed."""
    teachers = [Run(setting, TEACHER, FIRST_SEED, output) for setting in settings if setting.teacher]
    students = [Run(s, row, seed, output) for seed in seeds for s in settings for row in s.rows]
    return teachers, students
