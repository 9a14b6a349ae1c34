"""Reading a plan: its YAML, and everything that can be wrong with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ..core.errors import ConfigError
from ..report.comparison import STUDENT_ALONE, TEACHER
from ..yaml_file import load_yaml
from .plan import COMMANDS, REFERENCE, Setting, Tuning, slug

__all__ = ["read_plan"]

SEEDS = (0, 1, 2)
"""The seeds of students where neither plan nor command says others."""


def read_plan(path: str | Path, seeds: Sequence[int] = ()) -> list[Setting]:
    """Read the settings of a plan, a YAML file.

    Args:
        path: the file.
        seeds: the students' seeds in every setting; those of the plan if there are none.

    Raises:
        ConfigError: the file cannot be read, or is not a plan.
    """
    try:
        content = load_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError("plan", f"{path}, which cannot be read ({reason})", allowed="a YAML file") from error
    settings = content.get("settings") if isinstance(content, dict) else None
    if not isinstance(settings, dict) or not all(isinstance(entry, dict) for entry in settings.values()):
        raise ConfigError("plan", f"{path} without settings", allowed="'settings:' with a name and keys for each")
    for key in content:
        if key not in ("settings", "seeds"):
            raise ConfigError("plan", f"{key} in {path}", allowed="settings and seeds")
    if len({slug(name) for name in settings}) < len(settings):
        listed = ", ".join(settings)
        raise ConfigError("settings", f"{listed} in {path}", allowed="names that give each setting its own folder")
    common = _seeds(content.get("seeds", SEEDS), str(path))
    read = [_setting(name, {"seeds": common, **entry}) for name, entry in settings.items()]
    if seeds:
        read = [replace(setting, seeds=tuple(dict.fromkeys(seeds))) for setting in read]
    for setting in read:
        if setting.tuning and setting.tuning.seed in setting.seeds:
            found = f"{setting.tuning.seed} for tuning and for results in {setting.name}"
            raise ConfigError("seed", found, allowed="a seed that no result has")
    return read


def _setting(name: str, content: Mapping[str, Any]) -> Setting:
    known, needed = list(Setting.__dataclass_fields__)[1:], ("engine", "run", "metrics", "rows")
    unknown = [key for key in content if key not in known]
    if unknown:
        raise ConfigError("settings", f"{unknown[0]} in {name}", allowed=f"one of the keys {', '.join(known)}")
    for key in needed:
        if not content.get(key):
            raise ConfigError(key, f"nothing in {name}", allowed=f"a value for each of {', '.join(needed)}")
    values = dict(content)
    for key in ("run", "metrics", "teacher"):
        values[key] = _arguments(key, name, content.get(key))
    values["rows"] = {row: _arguments("rows", name, more) for row, more in _mapping("rows", name, content).items()}
    values["seeds"] = _seeds(content["seeds"], name)
    if "tuning" in content:
        values["tuning"] = _tuning(name, _mapping("tuning", name, content), values["rows"])
    if values["engine"] not in COMMANDS:
        raise ConfigError("engine", f"{values['engine']} in {name}", allowed=f"one of {', '.join(COMMANDS)}")
    values["control"] = content.get("control") or (STUDENT_ALONE if STUDENT_ALONE in values["rows"] else "")
    _check_rows(name, values)
    _check_references(name, values)
    _check_threshold(name, values)
    return Setting(name, **values)


def _mapping(key: str, name: str, content: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(content[key], dict):
        raise ConfigError(key, f"{content[key]} in {name}", allowed="keys with values")
    return content[key]


def _arguments(key: str, name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | None) or any(isinstance(each, list | dict | None) for each in value or ()):
        raise ConfigError(key, f"{value} in {name}", allowed="a list of arguments")
    return tuple(map(str, value or ()))


def _seeds(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not value or not all(type(seed) is int and seed >= 0 for seed in value):
        raise ConfigError("seeds", f"{value} in {name}", allowed="a list of whole numbers >= 0")
    return tuple(dict.fromkeys(value))


def _check_rows(name: str, values: Mapping[str, Any]) -> None:
    rows = values["rows"]
    if len({slug(row) for row in (*rows, TEACHER)}) < len(rows) + 1:
        listed = ", ".join((TEACHER, *rows))
        raise ConfigError("rows", f"{listed} in {name}", allowed="names that give each row its own folder")
    for key in ("control", "mimicking"):
        if values.get(key) and values[key] not in rows:
            raise ConfigError(key, f"{values[key]} in {name}", allowed=f"one of the rows {', '.join(rows)}")


def _check_references(name: str, values: Mapping[str, Any]) -> None:
    """Check that rows name earlier rows alone; the tuned ones, whose tuning has another seed, none."""
    tuning, earlier = values.get("tuning"), list[str]()
    arguments = {"run": values["run"], "teacher": values["teacher"], **values["rows"]}
    for row, own in arguments.items():
        more = [argument for candidate in (tuning.rows.get(row, ()) if tuning else ()) for argument in candidate]
        for other in REFERENCE.findall(" ".join([*own, *more])):
            if other not in earlier or (tuning and row in tuning.rows):
                allowed = "a row above, in a row that is not tuned"
                raise ConfigError("rows", f"{{row:{other}}} for {row} in {name}", allowed=allowed)
        if row in values["rows"]:
            earlier.append(row)


def _check_threshold(name: str, values: Mapping[str, Any]) -> None:
    threshold = values.get("threshold")
    if threshold is None:
        return
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < math.inf:
        raise ConfigError("threshold", f"{threshold} in {name}", allowed="a number >= 0, in points of the first metric")
    if not values["control"]:
        raise ConfigError("control", f"nothing in {name}", allowed="the row that a threshold refers to")


def _tuning(name: str, content: Mapping[str, Any], rows: Mapping[str, Any]) -> Tuning:
    expected = "seed, run and rows"
    for key in content:
        if key not in Tuning.__dataclass_fields__:
            raise ConfigError("tuning", f"{key} in {name}", allowed=expected)
    for key in Tuning.__dataclass_fields__:
        if content.get(key) in (None, [], {}):  # the run's arguments choose other data than those of the results
            raise ConfigError("tuning", f"no {key} in {name}", allowed=expected)
    candidates = {}
    for row, listed in _mapping("rows", name, content).items():
        if row not in rows:
            raise ConfigError("tuning", f"{row} in {name}", allowed=f"one of the rows {', '.join(rows)}")
        if not isinstance(listed, list) or len(listed) < 2:
            raise ConfigError("tuning", f"{listed} for {row} in {name}", allowed="two or more lists of arguments")
        candidates[row] = tuple(_arguments("tuning", f"{row} in {name}", each) for each in listed)
    (seed,) = _seeds([content["seed"]], f"the tuning of {name}")
    return Tuning(seed, _arguments("tuning", name, content["run"]), candidates)
