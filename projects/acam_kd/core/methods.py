"""One method or several at once: from their settings to the distiller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .distiller import NOTHING_KNOWN, Distiller
from .errors import ConfigError
from .features import Features, FeatureSpec, Pyramid, describe
from .options import Request, all_arguments
from .registry import DISTILLER_REGISTRY
from .targets import Targets

__all__ = ["SeveralMethods", "build_distiller", "levels_read"]


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


def build_distiller(requests: Sequence[Request], student: Sequence[Pyramid], teacher: Sequence[Pyramid]) -> Distiller:
    """Build the distiller of one method, or of several.

    Args:
        requests: at least one.
        student, teacher: for each request the levels, with the same keys.

    Raises:
        ConfigError: an argument of a method is wrong, or none of the levels is for it.
    """
    built: dict[str, Distiller] = {}
    for request, of_student, of_teacher in zip(requests, student, teacher):
        levels = levels_read(request.name, of_student)
        try:
            built[request.name] = request.method(levels, {s: of_teacher[s] for s in levels}, **request.arguments)
        except ConfigError as error:
            raise error.of(request.name, all_arguments(request.name)) from error
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
