"""The settings of a comparison, and the command of each of its runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..report.comparison import TEACHER

__all__ = ["COMMANDS", "REFERENCE", "ROOT", "Run", "Setting", "Tuning", "runs_of", "slug"]

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = {
    "torchvision": [sys.executable, "-m", "acam_kd.cli", "train"],
    "detectron2": [sys.executable, "-m", "acam_kd.d2.train"],
}
FINAL = {"torchvision": "result.json", "detectron2": "model_final.pth"}
"""Engine -> the file that a run's folder gets when training is complete."""
FIRST_SEED = 0
"""The seed of every teacher."""
REFERENCE = re.compile(r"\{row:([^{}]+)\}")
"""The folder of another row's run of the same seed, in an argument."""


def slug(name: str) -> str:
    """Turn a name into a part of a path."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


@dataclass(frozen=True)
class Tuning:
    """The choice of some rows' arguments, by runs that are no results.

    Args:
        seed: the seed of these runs, which no result has.
        run: arguments added to these runs, which evaluate them on data that no result is evaluated on.
        rows: row -> its candidates, each a list of arguments. The best one is added to the row's own.
    """

    seed: int
    run: tuple[str, ...]
    rows: Mapping[str, tuple[tuple[str, ...], ...]]


@dataclass(frozen=True)
class Setting:
    """Engine, pair and data of a comparison, and its rows.

    Args:
        name: the setting's name.
        engine: a key of ``COMMANDS``.
        run: arguments of every student's run; ``{teacher}`` stands for the folder of the teacher's run, ``{row:NAME}``
            for that of an earlier row's run of the same seed.
        metrics: names as in the engine's results; the first is compared.
        rows: the name of a row -> its additional arguments.
        seeds: the seeds of the students.
        teacher: arguments of the teacher's run, which comes first; empty for no teacher.
        control: the row that the others are compared with; empty for no such row.
        threshold: the gain over the control, in points of the first metric, that a verdict asks for; None for none.
        mimicking: the row that every method should beat; empty for no such row.
        tuning: the choice of some rows' arguments, before the others run.
    """

    name: str
    engine: str
    run: tuple[str, ...]
    metrics: tuple[str, ...]
    rows: Mapping[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    teacher: tuple[str, ...] = ()
    control: str = ""
    threshold: float | None = None
    mimicking: str = ""
    tuning: Tuning | None = None

    def candidates(self, row: str) -> tuple[tuple[str, ...], ...]:
        """Return the candidates of a row; none if it is not tuned."""
        return self.tuning.rows.get(row, ()) if self.tuning else ()


@dataclass(frozen=True, eq=False)
class Run:
    """One run: a setting, a row, a seed, and its folder.

    Args:
        setting, row, seed: the place in the plan.
        output: the folder of all runs.
        candidate: the number of the candidate that is added to the row's arguments, in a row that is tuned.
        tuning: the run tries the candidate, and is no result.
    """

    setting: Setting
    row: str
    seed: int
    output: Path
    candidate: int | None = None
    tuning: bool = False
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        part = f"{slug(self.row)}_tune{self.candidate}" if self.tuning else f"{slug(self.row)}_seed{self.seed}"
        part = TEACHER if self.row == TEACHER else part
        object.__setattr__(self, "folder", self.output / slug(self.setting.name) / part)

    @property
    def key(self) -> tuple[str, str, int, int | None]:
        """The setting, row, seed, and candidate of a tuning run, that a record is found by."""
        return self.setting.name, self.row, self.seed, self.candidate if self.tuning else None

    @property
    def trained(self) -> bool:
        """True if training is complete, though perhaps not the evaluation."""
        return (self.folder / FINAL[self.setting.engine]).is_file()

    @property
    def tried(self) -> tuple[str, ...]:
        """The arguments of its candidate; empty in a row that is not tuned."""
        return () if self.candidate is None else self.setting.candidates(self.row)[self.candidate]

    @property
    def arguments(self) -> list[str]:
        """The arguments as in the plan, without paths of one machine, so that a record can be read elsewhere."""
        setting = self.setting
        if self.row == TEACHER:
            return list(setting.teacher)
        split = setting.tuning.run if setting.tuning and self.tuning else ()
        return [*setting.run, *setting.rows[self.row], *self.tried, *split]

    @property
    def needed(self) -> list[Run]:
        """The runs of other rows, of the same seed, whose folders are among its arguments."""
        names = [name for argument in self.arguments for name in REFERENCE.findall(argument)]
        return [Run(self.setting, name, self.seed, self.output) for name in dict.fromkeys(names)]

    def options(self) -> list[str]:
        """Return the arguments of its process, after the program's name."""
        folders = {f"{{row:{run.row}}}": run.folder for run in self.needed}
        folders["{teacher}"] = self.output / slug(self.setting.name) / TEACHER
        arguments = self.arguments
        for name, folder in folders.items():
            arguments = [argument.replace(name, str(folder)) for argument in arguments]
        if self.setting.engine == "detectron2":
            return ["--resume", *arguments, "SEED", str(self.seed), "OUTPUT_DIR", str(self.folder)]
        return [*arguments, "--seed", str(self.seed), "--output", str(self.folder), "--resume"]

    def command(self) -> list[str]:
        """Return the command of the process that starts or resumes it."""
        return [*COMMANDS[self.setting.engine], *self.options()]

    def __str__(self) -> str:
        return f"{self.setting.name}: {self.row}, " + (
            f"tuning {self.candidate}" if self.tuning else f"seed {self.seed}"
        )


def runs_of(setting: Setting, output: Path) -> tuple[list[Run], list[Run], list[Run]]:
    """List the runs of a setting: the teacher's, those of tuning, and the students' seed after seed.

    The students' runs of a tuned row have no candidate yet.
    """
    teacher = [Run(setting, TEACHER, FIRST_SEED, output)] if setting.teacher else []
    tuning = []
    if setting.tuning:
        for row, candidates in setting.tuning.rows.items():
            tuning += [Run(setting, row, setting.tuning.seed, output, k, True) for k in range(len(candidates))]
    return teacher, tuning, [Run(setting, row, seed, output) for seed in setting.seeds for row in setting.rows]
