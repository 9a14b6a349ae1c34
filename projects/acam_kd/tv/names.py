"""The command's options for the core's arguments and the settings of a run."""

from __future__ import annotations

__all__ = ["option"]

OPTIONS = {
    "classes": "--classes",
    "dataset": "--data, or the files of each split",
    "learning_rate": "--lr",
    "optimizer": "the optimizer",
    "options": "--set",
    "period": "--distill-period",
    "student_levels": "--levels",
    "targets": "the data",
    "teacher_levels": "--levels",
    "train_split": "--train",
    "val_split": "--val",
}
"""Those that are not ``--argument``."""


def option(argument: str) -> str:
    """Return the option of an argument; ``PKD.alpha`` is a method's.

    Example:
        >>> option("PKD.alpha"), option("student_weights"), option("period")
        ('--set PKD.alpha', '--student-weights', '--distill-period')
    """
    if argument in OPTIONS:
        return OPTIONS[argument]
    if "." in argument:
        return f"--set {argument}"
    return argument if argument.startswith("-") else f"--{argument.replace('_', '-')}"
