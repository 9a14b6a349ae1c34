"""One method or several at once: from their names to the distiller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .distiller import NOTHING_KNOWN, Distiller, method_arguments
from .errors import ConfigError
from .features import Features, FeatureSpec, Pyramid, describe
from .registry import DISTILLER_REGISTRY
from .renamed import current_arguments
from .targets import Targets

__all__ = [
    "SeveralMethods",
    "build_distiller",
    "check_options",
    "check_taps_used",
    "choose_taps",
    "levels_read",
    "read_methods",
]


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


def check_options(methods: Mapping[str, Mapping[str, Any]]) -> None:
    """Check the hyper-parameters of methods against their constructors.

    Args:
        methods: name -> arguments of its constructor.

    Raises:
        ConfigError: an argument is unknown, or its value is of another type than the default.
    """
    for name, options in methods.items():
        known = method_arguments(DISTILLER_REGISTRY.get(name))
        for option, value in options.items():
            if option not in known:
                allowed = ", ".join(f"{argument}={default!r}" for argument, default in known.items())
                raise ConfigError(f"{name}.{option}", repr(value), f"one of {allowed}" if allowed else "no argument")
            if not _fits(value, known[option]):
                raise ConfigError(
                    f"{name}.{option}", repr(value), f"{type(known[option]).__name__}, as {known[option]!r}"
                )


def _fits(value: Any, default: Any) -> bool:
    """Say whether a value has the type of the default; an int passes for a float, a bool for nothing else."""
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, type(default)) and isinstance(value, bool) == isinstance(default, bool)


def choose_taps(methods: Sequence[str], offered: Sequence[str], model: str) -> tuple[str, ...]:
    """Choose the taps that methods use when none is asked for: each the first of those offered that it can use.

    Args:
        methods: names.
        offered: the taps of a model of that kind, the usual first.
        model: its kind, for the message.

    Raises:
        ConfigError: a method can use none of them.
    """
    chosen: dict[str, None] = {}
    for name in methods:
        usable = [tap for tap in offered if tap in DISTILLER_REGISTRY.get(name).reads]
        if not usable:
            reads = " or ".join(DISTILLER_REGISTRY.get(name).reads)
            raise ConfigError(
                "method", name, f"one for what a {model} gives: {' or '.join(offered)}", f"{name} distils {reads}"
            )
        chosen[usable[0]] = None
    return tuple(chosen) or (offered[0],)


def check_taps_used(taps: Sequence[str], methods: Sequence[str]) -> None:
    """Raise ConfigError for a tap that was asked for and that no method uses."""
    used = {tap for name in methods for tap in DISTILLER_REGISTRY.get(name).reads}
    unused = [tap for tap in taps if tap not in used]
    if methods and unused:
        raise ConfigError(
            "taps",
            " and ".join(unused),
            f"only {' and '.join(sorted(used))} with {' and '.join(methods)}",
            "see {method}",
        )


def levels_read(method: str, pyramid: Pyramid) -> dict[str, FeatureSpec]:
    """Select the tapped levels that a method can use.

    Raises:
        ConfigError: there are none.
    """
    reads = DISTILLER_REGISTRY.get(method).reads
    levels = {level: spec for level, spec in pyramid.items() if spec.tap in reads}
    if not levels:
        raise ConfigError(
            "method", method, f"one for {describe(pyramid)}", f"{method} distils {' or '.join(reads)}; see {{taps}}"
        )
    return levels


def build_distiller(methods: Mapping[str, Mapping[str, Any]], student: Pyramid, teacher: Pyramid) -> Distiller:
    """Build the distiller of one method, or of several that share the levels: each gets those that it can use.

    Args:
        methods: name -> arguments of its constructor; at least one.
        student, teacher: the tapped levels, with the same keys.

    Raises:
        ConfigError: an argument of a method is wrong, or none of the levels is for it.
    """
    methods = {name: current_arguments(DISTILLER_REGISTRY.get(name), given) for name, given in methods.items()}
    check_options(methods)
    built: dict[str, Distiller] = {}
    for name, arguments in methods.items():
        method, levels = DISTILLER_REGISTRY.get(name), levels_read(name, student)
        try:
            built[name] = method(levels, {s: teacher[s] for s in levels}, **arguments)
        except ConfigError as error:
            raise error.of(name, method_arguments(method)) from error
    return next(iter(built.values())) if len(built) == 1 else SeveralMethods(built)


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
        for method in self.parts():
            of_student, of_teacher = ({level: maps[level] for level in method.levels} for maps in (student, teacher))
            losses.update(method(of_student, of_teacher, targets))
        return losses

    def parts(self) -> list[Distiller]:
        """List the methods."""
        return list(self._named().values())

    def metrics(self) -> dict[str, Tensor]:
        """Return the metrics of every method, under ``<method>/<level>/<quantity>``."""
        return {
            f"{name}/{key}": value for name, method in self._named().items() for key, value in method.metrics().items()
        }

    def masks(self) -> dict[str, dict[str, Tensor]]:
        """Return the masks of the first method that has any."""
        return next((masks for method in self.parts() if (masks := method.masks())), {})

    def warnings(self) -> dict[str, str]:
        """Return the warnings of every method."""
        return {
            f"{name}/{place}": text
            for name, method in self._named().items()
            for place, text in method.warnings().items()
        }

    def _named(self) -> dict[str, Distiller]:
        return dict(self.methods.items())  # type: ignore[arg-type]
