"""Names of predicted classes, as adapters know them and as users give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .features import FeatureSpec

if TYPE_CHECKING:
    from .adapter import Adapter

__all__ = ["BACKGROUND", "UNUSED", "channel_names", "check_class_map", "check_class_names", "read_class_map"]

BACKGROUND = "__background__"
"""The name of the background among predicted classes, as torchvision has it."""
UNUSED = "N/A"
"""The name of a channel that predicts no class; torchvision's models of COCO have ten."""


def channel_names(model: Adapter, spec: FeatureSpec, role: str) -> list[str]:
    """Return a name for each channel of a model's predictions; none if they are unknown.

    Args:
        model: with ``class_names``, which may leave the background out.
        spec: the shape of the predictions.
        role: ``"student"`` or ``"teacher"``, for messages.

    Raises:
        ConfigError: there are more or fewer names than classes.
    """
    names, place = list(model.class_names), model.background(spec)
    if names and place is not None and BACKGROUND not in names:
        names.insert(place, BACKGROUND)
    if names and len(names) != spec.channels:
        with_background = ", the background among them" if place is not None else ""
        raise ConfigError(
            f"{role}_class_names", f"{len(names)} names{with_background}",
            f"{spec.channels}, one for each class that the {role} predicts",
        )  # fmt: skip
    if BACKGROUND in names and place is not None and names.index(BACKGROUND) != place:
        raise ConfigError(
            f"{role}_class_names", f"{BACKGROUND} at {names.index(BACKGROUND)}", f"it at {place}, or left out",
            f"a {model.name} predicts it there",
        )  # fmt: skip
    return names


def check_class_map(class_map: Any) -> None:
    """Raise ConfigError for a mapping that is not of names to names."""
    if not isinstance(class_map, Mapping) or not all(isinstance(x, str) for pair in class_map.items() for x in pair):
        raise ConfigError("class_map", repr(class_map), "student's name of a class -> the teacher's")


def check_class_names(argument: str, names: Any) -> list[str]:
    """Return names of classes as a list.

    Raises:
        ConfigError: they are no list of strings.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ConfigError(argument, repr(names), "a list of names, one for each class")
    return list(names)


def read_class_map(pairs: Sequence[str]) -> dict[str, str]:
    """Read ``"student's name=teacher's name"``, each.

    Raises:
        ConfigError: a pair has another form, or a name is mapped to two classes.

    Example:
        >>> read_class_map(["pedestrian=person", "cab=car"])
        {'pedestrian': 'person', 'cab': 'car'}
    """
    class_map: dict[str, str] = {}
    for pair in [pairs] if isinstance(pairs, str) else pairs:
        own, equals, other = (part.strip() for part in str(pair).partition("="))
        if not own or not equals or not other or class_map.get(own, other) != other:
            raise ConfigError("class_map", pair, "NAME=NAME, the student's and the teacher's, once for each class")
        class_map[own] = other
    return class_map
