"""The selection of taps and levels: which of a student's each method distils, and their partners in the teacher."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from .adapter import Adapter
from .distiller import ALL
from .errors import ConfigError
from .features import CLASSES, LOGITS, TAPS, Pyramid, describe, match_levels
from .options import Request
from .registry import DISTILLER_REGISTRY

__all__ = ["check_taps", "choose_taps", "pair_levels", "taps_of"]


def choose_taps(method: str, offered: Sequence[str], model: str) -> tuple[str, ...]:
    """Choose the tap of a method for which none is asked: the first of those offered that it can use.

    Args:
        method: its name.
        offered: the taps of a model of that kind, the usual first.
        model: its kind, for the message.

    Raises:
        ConfigError: the method can use none of them.
    """
    reads = DISTILLER_REGISTRY.get(method).reads
    usable = [tap for tap in offered if tap in reads]
    if not usable:
        allowed = f"one for what a {model} gives: {' or '.join(offered)}"
        raise ConfigError("method", method, allowed, f"{method} distils {' or '.join(reads)}")
    return (usable[0],)


def taps_of(request: Request, student: Adapter, levels: Pyramid) -> tuple[str, ...]:
    """Return the taps of a method: those asked for or its recipe's, else those of its levels, else the usual one.

    Args:
        request: the method's settings.
        student: the model that learns.
        levels: all of the student's, of every tap; empty if no level is asked for.

    Raises:
        ConfigError: the method uses none of them.
    """
    reads, taps, origin = request.method.reads, request.taps, request.origins["taps"]
    if not origin.startswith("given") and levels and request.levels:  # asked for by the levels' names
        asked = {levels[level].tap for level in request.levels if level in levels}
        if request.origins["levels"] == "given for all":  # the others are for other methods
            asked &= {*reads}
        taps = tuple(tap for tap in TAPS if tap in asked)
    usable, unused = (tuple(tap for tap in taps if (tap in reads) is used) for used in (True, False))
    if taps and (not usable or (origin == "given" and unused)):
        argument = f"{request.name}.taps" if origin == "given" else "taps"
        allowed = f"{' or '.join(reads)} with {request.name}"
        raise ConfigError(argument, " and ".join(unused), allowed, "or choose another {method}")
    return usable or choose_taps(request.name, student.offered, student.name)


def check_taps(taps: Sequence[str], student: Adapter, teacher: Adapter) -> None:
    """Raise ConfigError for a tap that one of the two models does not have."""
    for role, model in (("student", student), ("teacher", teacher)):
        missing = [tap for tap in taps if tap not in (*model.offered, *model.on_request)]
        if missing:
            raise ConfigError(
                "taps", " and ".join(missing), f"{' or '.join(model.offered)} of the {role}, a {model.name}",
                f"{LOGITS} is the map of a segmentation model, {CLASSES} the class head of a detector; choose others, "
                "or another {method}",
            )  # fmt: skip


def pair_levels(
    shapes: Mapping[str, Pyramid],
    taps: Sequence[str],
    logger: logging.Logger,
    levels: Sequence[str] = (),
    *,
    recipe: tuple[int, int | None] = ALL,
) -> dict[str, str]:
    """Pair the levels that one method distils.

    Args:
        shapes: ``"student"`` and ``"teacher"`` -> all levels.
        taps: the method's.
        logger: for a warning about levels without a partner.
        levels: the student's that were asked for, or ``("all",)``. If only predictions are named, no map is distilled.
        recipe: the maps to take, from the finest, if none was asked for.

    Raises:
        ConfigError: see ``match_levels``.
    """
    if "all" in levels and len(levels) > 1:
        raise ConfigError("levels", ", ".join(levels), "'all' alone, or names of levels")
    if "all" in levels:
        levels, recipe = (), ALL
    student, teacher = ({s: x for s, x in shapes[role].items() if x.tap in taps} for role in ("student", "teacher"))
    maps = [level for level in levels if not (level in (LOGITS, CLASSES) and level in student)]
    if levels and not maps:
        student = {s: x for s, x in student.items() if s in levels}
    elif not levels:
        finest_first = sorted((s for s, x in student.items() if not x.logits), key=lambda s: student[s].stride)
        chosen = finest_first[slice(*recipe)] or finest_first[-1:]  # a transformer has one level only
        keep = {*chosen, *(s for s, x in student.items() if x.logits)}
        student = {s: x for s, x in student.items() if s in keep}
    pairs = match_levels(student, teacher, maps)
    if not levels and (alone := [level for level in student if level not in pairs]):
        logger.warning(
            "not every level of the student has a partner of its stride, so %s will not be distilled. student: %s; "
            "teacher: %s", ", ".join(alone), describe(student), describe(teacher),
        )  # fmt: skip
    return pairs
