"""The settings of methods: what is given, else the recipe's for this kind of model, else the default."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from .distiller import ALL, Distiller, Recipe, method_arguments
from .errors import ConfigError
from .registry import DISTILLER_REGISTRY
from .renamed import current_arguments

__all__ = ["Request", "all_arguments", "as_type", "note_own", "read_methods", "read_request"]

_own: set[tuple[str, str, str]] = set()
"""Method, argument, value: what the run filled in itself, though it travels with what the user gave."""


def read_methods(names: str) -> list[str]:
    """Split ``"PKD+KD"`` into ``["PKD", "KD"]``; an empty string gives an empty list.

    Raises:
        ConfigError: a name is not registered, or comes twice.
    """
    methods = [name.strip() for name in names.split("+")] if names else []
    for name in methods:
        DISTILLER_REGISTRY.get(name)
    if len(set(methods)) < len(methods):
        raise ConfigError("method", names, "each method once")
    return methods


def note_own(method: str, argument: str, value: str) -> None:
    """Note a value that the run fills in where the user left it open, so that the log does not call it given."""
    _own.add((method, argument, value))


def all_arguments(name: str) -> dict[str, Any]:
    """Return everything that can be set of a method -> its default: its hyper-parameters, its levels and its taps.

    Example:
        >>> import acam_kd.methods
        >>> all_arguments("CWD")
        {'alpha': 10.0, 'temperature': 1.0, 'levels': (), 'taps': ()}
    """
    own = method_arguments(DISTILLER_REGISTRY.get(name))
    if clash := [choice for choice in CHOICES if choice in own]:
        raise ConfigError("method", f"{name} with an argument {clash[0]}", "another name for it: every method has that")
    return {**own, **CHOICES}


CHOICES: dict[str, Any] = {"levels": (), "taps": ()}
"""The settings that every method has."""


@dataclass(frozen=True)
class Request:
    """A method with every setting decided, as far as no model is needed for it.

    Args:
        name: the method's.
        family: the kind of model whose recipe was looked up.
        arguments: of its constructor, all of them.
        levels: the student's levels that were asked for; empty for the recipe's.
        taps: those that were asked for or are the recipe's; empty for the first that the method can use.
        recipe: for this kind of model; an empty one if there is none.
        origins: argument, ``levels``, ``taps`` -> where the value comes from: ``"given"``, ``"given for all"``,
            ``"recipe"``, ``"the run's own"`` or ``"default"``.
    """

    name: str
    family: str
    arguments: dict[str, Any]
    levels: tuple[str, ...]
    taps: tuple[str, ...]
    recipe: Recipe
    origins: dict[str, str]

    @property
    def method(self) -> type[Distiller]:
        """The class."""
        return DISTILLER_REGISTRY.get(self.name)  # type: ignore[no-any-return]

    def describe(self, levels: Sequence[str], taps: Sequence[str]) -> str:
        """Return one line with all settings and their origins, after levels and taps are chosen."""
        lists = {"levels": ", ".join(levels), "taps": ", ".join(taps)}
        origins = dict(self.origins)
        if origins["levels"] == "given for all" and not {*levels} & {*self.levels}:  # they were for other methods
            origins["levels"] = "default"
        if not origins["taps"].startswith("given") and self.taps != tuple(taps):
            origins["taps"] = "by the levels" if self.levels else "default"
        values = [*(f"{argument}={value!r}" for argument, value in self.arguments.items())]
        values += [f"{choice} {value}" for choice, value in lists.items()]
        said = [f"{value} ({origins[name]})" for name, value in zip((*self.arguments, *lists), values)]
        source = f"; the recipe for {self.family}: {self.recipe.source}" if self.recipe.source else ""
        return f"{self.name}: {', '.join(said)}{source}"


def read_request(
    name: str, options: Mapping[str, Any], *, family: str = "", levels: Sequence[str] = (), taps: Sequence[str] = ()
) -> Request:
    """Decide every setting of a method: what is given, else the recipe's for this kind of model, else the default.

    Args:
        name: of the method.
        options: argument, ``levels`` or ``taps`` -> value; None or a missing key means: not given.
        family: the kind of model that learns.
        levels, taps: those for all methods that have none of their own.

    Raises:
        ConfigError: an argument is unknown, or its value is of another type than the default.
    """
    options = current_arguments(DISTILLER_REGISTRY.get(name), options)
    known, recipe = all_arguments(name), DISTILLER_REGISTRY.get(name).recipes.get(family, Recipe(""))
    for option, value in options.items():
        if option not in known:
            allowed = ", ".join(f"{argument}={default!r}" for argument, default in known.items())
            raise ConfigError(f"{name}.{option}", repr(value), f"one of {allowed}")
    values, origins = dict(known), dict.fromkeys(known, "default")
    own = {option: as_type(known[option], f"{name}.{option}", x) for option, x in options.items() if x is not None}
    sources = {
        "recipe": {**recipe.arguments, "taps": recipe.taps},
        "given for all": {"levels": tuple(levels), "taps": tuple(taps)},
        "given": own,
    }
    for origin, chosen in sources.items():  # later ones win
        for option, value in chosen.items():
            if option not in CHOICES or value:
                filled_in = origin == "given" and (name, option, str(value)) in _own
                values[option], origins[option] = value, "the run's own" if filled_in else origin
    if recipe.levels != ALL and not values["levels"]:
        origins["levels"] = "recipe"
    chosen_levels, chosen_taps = (values.pop(choice) for choice in CHOICES)
    return Request(name, family, values, chosen_levels, chosen_taps, recipe, origins)


def as_type(default: Any, argument: str, value: Any) -> Any:
    """Return a setting with the type of its default: an int passes for a float, and so does a number written as text.

    Raises:
        ConfigError: it has another type.
    """
    if isinstance(default, float) and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(default, float) and isinstance(value, Real) and not isinstance(value, bool):
        value = float(value)
    if default is None:
        return value
    if default == ():
        if isinstance(value, str):
            value = [part.strip() for part in value.strip("[]() ").split(",") if part.strip()]
        if isinstance(value, Sequence) and all(isinstance(part, (str, int)) for part in value):
            return tuple(map(str, value))
        raise ConfigError(argument, repr(value), "a list of names")
    if isinstance(value, type(default)) and isinstance(value, bool) == isinstance(default, bool):
        return value
    raise ConfigError(argument, repr(value), f"{type(default).__name__}, as {default!r}")
