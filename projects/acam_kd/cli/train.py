"""``acam-kd train``: a model alone, or from a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError
from ..data.folders import ClassSplit
from ..data.labels import read_names
from ..fields import instance, option
from ..files import to_json
from ..tv.models import is_segmentation
from ..tv.run import Settings
from .command import Command, Parser, Values
from .data import Data

__all__ = ["COMMAND", "print_metrics", "settings_of", "train_settings"]


@dataclass(frozen=True)
class Folder:
    """The options of the run's folder."""

    output: Path = option(section="the run", type=Path, metavar="FOLDER", help="folder of the run")
    resume: bool = option(False, help="resume the run in --output, if there is one")


def run(values: Values) -> None:
    """Train, and print the metrics.

    Raises:
        ConfigError: an option cannot be used, or Lightning is not installed.
        RunError: the run cannot go on.
    """
    try:
        from ..tv.training import train
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "lightning":
            raise
        raise ConfigError(
            "command", "train without Lightning", "Lightning to be installed", "pip install 'acam-kd[lightning]'"
        ) from error

    folder = instance(Folder, values)
    result = train(settings_of(values), folder.output, resume=folder.resume)
    if result is not None:  # else another process of this run has it
        print_metrics(result["metrics"])
        print(f"the student: {folder.output / 'student.pth'}")


def print_metrics(metrics: dict[str, Any]) -> None:
    """Print metrics as a line of json."""
    print(to_json({name: value if value is None else round(value, 2) for name, value in metrics.items()}))


def train_settings(arguments: Sequence[str]) -> Settings:
    """Return the settings of ``acam-kd train`` with these arguments."""
    parser = Parser("acam-kd")
    COMMAND.add_to(parser.add_subparsers())
    return settings_of(COMMAND.values(parser.parse_args([COMMAND.name, *arguments])))


def settings_of(values: Values) -> Settings:
    """Return the settings that the options of ``acam-kd train`` mean."""
    splits = instance(Data, values).splits("train", "val", folder=values["output"])
    names = values["teacher_class_names"]
    settings = instance(
        Settings,
        values,
        train_split=splits["train"],
        val_split=splits["val"],
        method="" if values["method"] == "none" else values["method"],
        teacher_class_names=tuple(read_names(names, "teacher_class_names")) if names else (),
    )
    return settings if values["method"] or not values["teacher"] else replace(settings, method=_usual_method(settings))


def _usual_method(settings: Settings) -> str:
    """Return the default method of a run with a teacher, by docs/decisions/0011_the_default_follows_the_task.md."""
    if isinstance(settings.train_split, ClassSplit):
        return "KD"
    return "CWD" if is_segmentation(settings.student_name) else "ACAMKD"


COMMAND = Command(
    "train",
    "train a model, alone or from a teacher",
    run,
    (Data, Settings, Folder),
    "acam-kd train --data FOLDER --student fcos_resnet50_fpn --student-backbone-weights DEFAULT --output output/run",
    again="the same command with --resume",
    either=("epochs", "iterations"),
)
