"""``acam-kd doctor``: a look at the set-up before a long run."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from ..fields import instance, option
from ..tv.run import Settings
from .command import Command, Values
from .data import Data
from .train import settings_of

__all__ = ["COMMAND"]


@dataclass(frozen=True)
class Doctor:
    """The options that only this command has."""

    teacher_metric: bool = option(
        False, section="the doctor", help="evaluate the teacher on all validation images, not on ten"
    )


def run(values: Values) -> None:
    """Look at the set-up, and print the findings.

    Raises:
        ConfigError: the files of the data are not there.
        SystemExit: with status 1, if something is broken.
    """
    from ..tv.doctor import doctor

    looked = doctor(settings_of({**values, "output": None}), whole=instance(Doctor, values).teacher_metric)
    print(looked.table())
    if looked.status:
        sys.exit(looked.status)


COMMAND = Command(
    "doctor",
    "look at the set-up of a run before it starts: the options of train, without --output",
    run,
    (Data, Settings, Doctor),
    "acam-kd doctor --data FOLDER --student fcos_resnet18_fpn --teacher output/teacher",
    either=("epochs", "iterations"),
)
