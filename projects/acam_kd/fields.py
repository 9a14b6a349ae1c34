"""Command-line parsers made from dataclasses: each field carries its option's help, choices and default."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

__all__ = ["add_options", "defaults", "flag", "instance", "like", "natural", "option", "positive", "rate", "required"]

KEY = "option"
"""The entry of a field's metadata."""
T = TypeVar("T")


def option(default: Any = dataclasses.MISSING, *, help: str, section: str = "", flag: str = "", **more: Any) -> Any:
    """Make a field of a dataclass that is an option of a command, too.

    Args:
        default: the value if the option is left out; an option without one is required. A tuple makes it a list, which
            is extended when it is repeated; False makes it a switch.
        help: the text for ``--help``; a default that says something is added to it.
        section: the heading that begins here; the fields below belong to it.
        flag: its name, if it is not the field's; a name without dashes is that of an argument without a flag.
        **more: ``type``, ``choices``, ``metavar``, ``nargs`` as for argparse.

    Example:
        >>> @dataclasses.dataclass
        ... class Options:
        ...     steps: int = option(100, help="number of steps", type=positive)
        >>> parser = argparse.ArgumentParser()
        >>> add_options(parser, Options)
        >>> instance(Options, vars(parser.parse_args(["--steps", "7"]))), Options()
        (Options(steps=7), Options(steps=100))
    """
    return dataclasses.field(default=default, metadata={KEY: {"help": help, "section": section, "flag": flag, **more}})


def like(other: type, name: str, **changes: Any) -> Any:
    """Make a field like one of another dataclass, with some arguments of ``option`` changed."""
    (found,) = (field for field in _fields(other) if field.name == name)
    return option(**{"default": found.default, **found.metadata[KEY], "section": "", **changes})


def flag(field: dataclasses.Field[Any]) -> str:
    """Return the option of a field, as ``--batch-size``."""
    return field.metadata[KEY]["flag"] or f"--{field.name.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser, *classes: type) -> None:
    """Add the options of dataclasses; one that is left out is not in the namespace: see ``instance``."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    place: argparse._ActionsContainer = parser
    for cls in classes:
        for field in _fields(cls):
            arguments = dict(field.metadata[KEY])
            section, _ = arguments.pop("section"), arguments.pop("flag")
            if section:
                groups[section] = groups.get(section) or parser.add_argument_group(section)
                place = groups[section]
            if field.default is False:
                arguments["action"] = "store_true"
            elif isinstance(field.default, tuple):
                arguments = {"nargs": "+", "action": "extend", **arguments}
            if field.default and field.default is not dataclasses.MISSING and not isinstance(field.default, tuple):
                arguments["help"] += f" (default: {field.default})"
            if flag(field).startswith("-"):
                arguments["dest"] = field.name
                name = flag(field)
            else:
                name = field.name
            place.add_argument(name, default=argparse.SUPPRESS, **arguments)


def defaults(*classes: type) -> dict[str, Any]:
    """Return the defaults of all options that have one."""
    fields = [field for cls in classes for field in _fields(cls)]
    return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}


def required(*classes: type) -> dict[str, str]:
    """Return the options without a default: name of the field -> option."""
    fields = [field for cls in classes for field in _fields(cls)]
    return {field.name: flag(field) for field in fields if field.default is dataclasses.MISSING}


def instance(cls: type[T], values: Mapping[str, Any], **others: Any) -> T:
    """Make a dataclass of an option's values; lists become tuples.

    Args:
        cls: the dataclass.
        values: name of a field -> value, of other dataclasses' fields too.
        **others: fields that are no options, or whose value is another than the option's.
    """
    own = {field.name: values[field.name] for field in _fields(cls) if field.name in values}
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in own.items()} | others)


def _fields(cls: type) -> Iterable[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if KEY in field.metadata]


# Types of options.


def _number(kind: Callable[[str], Any], words: str, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {words}, found {text!r}") from None


def natural(text: str) -> int:
    """Read a whole number that is not negative."""
    value: int = _number(int, "a whole number", text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, found {value}")
    return value


def positive(text: str) -> int:
    """Read a whole number from 1."""
    value: int = _number(int, "a whole number", text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {value}")
    return value


def rate(text: str) -> float:
    """Read a positive, finite number."""
    value: float = _number(float, "a number", text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive and finite, found {value}")
    return value
