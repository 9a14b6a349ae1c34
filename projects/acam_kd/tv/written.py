"""The settings of a run as they lie in its folder, and what a resumed run may change of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ..core.errors import ConfigError
from ..data.folders import ClassSplit
from ..data.images import AUTO
from ..data.splits import LabelSplit
from ..fields import flag
from .run import Settings

__all__ = ["as_dict", "as_options", "check_same", "completed"]

ANYTIME = (
    "devices",
    "logger",
    "num_nodes",
    "accelerator",
    "workers",
    "eval_period",
    "checkpoint_period",
    "channels_last",
    "teacher_compile",
    "no_teacher_check",
    "epochs",  # iterations are compared
)
"""The settings that a resumed run may change."""
SCALED = ("iterations", "learning_rate")
"""The settings that follow from data and batch, and from the run that is resumed, where they are left out."""


def as_dict(settings: Settings) -> dict[str, Any]:
    """Return settings as a dict of json's types only."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))  # type: ignore[no-any-return]


def as_options(settings: Settings) -> dict[str, Any]:
    """Return the command's options that give these settings: name without dashes -> value."""
    found: dict[str, Any] = {}
    for name, split in (("train", settings.train_split), ("val", settings.val_split)):
        if isinstance(split, ClassSplit):
            found |= split.as_options()
            continue
        second = split.label_root if isinstance(split, LabelSplit) else split.image_root
        found[name] = [split.image_root if isinstance(split, LabelSplit) else split.json_file, second]
        found["image-range"] = split.image_range
        if isinstance(split, LabelSplit):
            found["classes"] = list(split.classes)
    values = as_dict(settings) | {"method": settings.method or "none"}
    for field in dataclasses.fields(settings)[2:]:
        value = values[field.name]
        if value or field.default or (value == 0 and field.default is None):
            found[flag(field).lstrip("-")] = value
    return found


def completed(settings: Settings, before: Mapping[str, Any]) -> Settings:
    """Return settings where what follows from the data is that of the run to resume, unless it was given.

    Args:
        settings: as asked for now.
        before: ``as_dict`` of the run.
    """
    return dataclasses.replace(
        settings,
        learning_rate=settings.learning_rate or before.get("learning_rate", 0.0),
        iterations=settings.iterations or (0 if settings.epochs else before.get("iterations", 0)),
    )


def check_same(settings: Settings, before: Mapping[str, Any], where: object) -> None:
    """Check that nothing is changed but what a resumed run may change.

    Args:
        settings: ``completed``.
        before: ``as_dict`` of the run.
        where: its folder, for the message.

    Raises:
        ConfigError: something else is.
    """
    defaults = {setting.name: setting.default for setting in dataclasses.fields(Settings)}
    for name, value in as_dict(settings).items():
        was = before.get(name, defaults[name])  # the setting may be newer than the run
        was = list(was) if isinstance(was, tuple) else was
        if isinstance(was, dict):  # of a split's files
            was = {"image_range": AUTO, **was}
        if name not in ANYTIME and was != value and (value or name not in SCALED):
            hint = "choose another {output}"
            raise ConfigError(name, value, allowed=f"{was!r}, as in the run in {where}", hint=hint)
