"""One method or several at once: from their names to the distiller."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .distiller import NOTHING_KNOWN, Distiller
from .features import Features, FeatureSpec, Pyramid, describe
from .registry import DISTILLER_REGISTRY
from .targets import Targets

__all__ = [
    "SeveralMethods",
    "build_distiller",
    "check_boxes_known",
    "check_taps_used",
    "choose_taps",
    "levels_read",
    "read_methods",
]


def read_methods(names: str) -> list[str]:
    """``"PKD+KD"`` -> ``["PKD", "KD"]``; empty for an empty string.

    Raises:
        KeyError: a name is not registered.
        ValueError: a name comes twice.
    """
    found = [name.strip() for name in names.split("+")] if names else []
    for name in found:
        DISTILLER_REGISTRY.get(name)
    if len(set(found)) < len(found):
        raise ValueError(f"a method comes twice in {names!r} (key: DISTILL.METHOD)")
    return found


def choose_taps(methods: Sequence[str], offered: Sequence[str], model: str) -> tuple[str, ...]:
    """The taps that methods use when none is asked for: each the first of those offered that it reads.

    Args:
        methods: names.
        offered: the taps of a model of that kind, the usual first.
        model: its kind, for the message.

    Raises:
        ValueError: a method can read none of them.
    """
    chosen: dict[str, None] = {}
    for name in methods:
        reads = DISTILLER_REGISTRY.get(name).reads
        usable = [tap for tap in offered if tap in reads]
        if not usable:
            raise ValueError(
                f"{name} distils {' or '.join(reads)}, a {model} gives {' and '.join(offered)} (key: DISTILL.METHOD)"
            )
        chosen[usable[0]] = None
    return tuple(chosen) or (offered[0],)


def check_taps_used(taps: Sequence[str], methods: Sequence[str]) -> None:
    """Raise ValueError for a tap that was asked for and that no method reads."""
    read = {tap for name in methods for tap in DISTILLER_REGISTRY.get(name).reads}
    unused = [tap for tap in taps if tap not in read]
    if methods and unused:
        raise ValueError(
            f"{' and '.join(methods)} cannot distil {' and '.join(unused)}, only {' and '.join(sorted(read))} (keys: "
            "DISTILL.TAPS, DISTILL.METHOD)"
        )


def check_boxes_known(methods: Iterable[str], model: str) -> None:
    """Raise ValueError for a method that needs boxes, with a kind of model that is trained without: it would get none.

    Args:
        methods: names.
        model: the kind, for the message.
    """
    for name in methods:
        if "boxes" in DISTILLER_REGISTRY.get(name).needs:
            raise ValueError(f"{name} needs boxes, and a {model} is trained without any (key: DISTILL.METHOD)")


def levels_read(method: str, pyramid: Pyramid) -> dict[str, FeatureSpec]:
    """Those of the tapped levels that a method reads.

    Raises:
        ValueError: there are none.
    """
    reads = DISTILLER_REGISTRY.get(method).reads
    levels = {level: spec for level, spec in pyramid.items() if spec.tap in reads}
    if not levels:
        raise ValueError(
            f"{method} distils {' or '.join(reads)}, and what is tapped is {describe(pyramid)} "
            "(keys: DISTILL.TAPS, DISTILL.METHOD)"
        )
    return levels


def build_distiller(methods: Mapping[str, Mapping[str, Any]], student: Pyramid, teacher: Pyramid) -> Distiller:
    """The distiller of one method, or of several that share the levels: each gets those that it reads.

    Args:
        methods: name -> arguments of its constructor; at least one.
        student, teacher: the tapped levels, with the same keys.

    Raises:
        ValueError: none of the levels is for a method.
    """
    built = {}
    for name, arguments in methods.items():
        method, levels = DISTILLER_REGISTRY.get(name), levels_read(name, student)
        with _keys_of(name):
            built[name] = method(levels, {s: teacher[s] for s in levels}, **arguments)
    return next(iter(built.values())) if len(built) == 1 else SeveralMethods(built)


OWN_KEYS = re.compile(r"\b(?:key|keys): [A-Z_.]+(?:, [A-Z_.]+)*")


@contextmanager
def _keys_of(method: str) -> Iterator[None]:
    """A method's errors name its own keys, as ALPHA; among several methods they are DISTILL.PKD.ALPHA."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        place = f"DISTILL.{method.upper()}."
        message = OWN_KEYS.sub(
            lambda keys: re.sub(r" (?!DISTILL\.)(?=[A-Z])", f" {place}", keys[0]), str(error.args[0])
        )
        raise type(error)(message) from error


class SeveralMethods(Distiller):
    """Several methods side by side; their losses, named after them, are added up by the trainer.

    Args:
        methods: name -> method, each with levels of its own.
    """

    def __init__(self, methods: Mapping[str, Distiller]) -> None:
        levels = {level: None for method in methods.values() for level in method.levels}
        super().__init__({}, {})
        self.levels = list(levels)
        self.needs = tuple({need: None for method in methods.values() for need in method.needs})
        self.methods = nn.ModuleDict(methods)

    def forward(self, student: Features, teacher: Features, targets: Targets = NOTHING_KNOWN) -> dict[str, Tensor]:
        """Return the losses of all methods."""
        losses: dict[str, Tensor] = {}
        for method in self._each().values():
            own, other = ({level: maps[level] for level in method.levels} for maps in (student, teacher))
            losses.update(method(own, other, targets))
        return losses

    def parts(self) -> list[Distiller]:
        """The methods."""
        return list(self._each().values())

    def metrics(self) -> dict[str, Tensor]:
        """Those of every method, under ``<method>/<level>/<quantity>``."""
        return {
            f"{name}/{key}": value for name, method in self._each().items() for key, value in method.metrics().items()
        }

    def masks(self) -> dict[str, dict[str, Tensor]]:
        """Those of the first method that has any."""
        return next((masks for method in self._each().values() if (masks := method.masks())), {})

    def warnings(self) -> dict[str, str]:
        """Those of every method."""
        return {
            f"{name}/{place}": text
            for name, method in self._each().items()
            for place, text in method.warnings().items()
        }

    def _each(self) -> dict[str, Distiller]:
        return dict(self.methods.items())  # type: ignore[arg-type]
