"""The assembly: from two adapters and a plan to a distillation, attached to the student. It is written once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .adapter import Adapter
from .class_names import check_class_map
from .classes import common_classes, foreign_class_layers
from .distillation import NAME, Distillation
from .distiller import Distiller
from .errors import ConfigError, first_line
from .features import CLASSES, LOGITS, TAPS, Pyramid
from .inheritance import inherit
from .methods import build_distiller
from .options import CHOICES, Request, read_request
from .pair_checks import check_annotations, check_class_heads, check_models, check_names
from .pairing import resized_levels
from .registry import DISTILLER_REGISTRY
from .scores import SCORES, check_scores, scored
from .selection import check_taps, pair_levels, taps_of
from .targets import Targets
from .teacher import FrozenTeacher, NoTeacher, PixelTransform
from .weighting import WeightSchedule

__all__ = ["INHERIT", "Plan", "assemble"]

INHERIT = ("auto", "always", "never")


@dataclass(frozen=True)
class Plan:
    """The request for a distillation.

    Args:
        methods: name -> its settings: arguments of its constructor, ``levels``, ``taps``, where None leaves one open;
            or a ready ``Distiller``; empty for inheritance alone.
        levels: the student's levels to distil, for every method without its own. If empty: the recipe's levels, or all
            levels whose stride the teacher has.
        taps: some of ``TAPS``, likewise; empty for the recipe's, else for what the method can use first.
        inherit: whether the student's neck and head start from the teacher's: ``"always"``, ``"never"``, or
            ``"auto"``, if both are detectors of one kind.
        schedule, period: see ``Distillation``.
        teacher_precision, teacher_compile: see ``FrozenTeacher``.
        channels_last: the memory format of student, teacher and method.
        class_map: student's name of a class -> the teacher's, where they differ.
    """

    methods: Mapping[str, Mapping[str, Any]] | Distiller = field(default_factory=dict)
    levels: Sequence[str] = ()
    taps: Sequence[str] = ()
    inherit: str = "never"
    schedule: WeightSchedule = field(default_factory=WeightSchedule)
    period: int = 1
    teacher_precision: str = ""
    teacher_compile: bool = False
    channels_last: bool = False
    class_map: Mapping[str, str] = field(default_factory=dict)


def assemble(
    student: Adapter,
    teacher: Adapter | None,
    plan: Plan,
    *,
    targets: Callable[..., Targets] | None = None,
    kind: type[Distillation] = Distillation,
    **engine: Any,
) -> Distillation | None:
    """Check everything that can be checked now, let the student inherit, build the method and attach it.

    Args:
        student, teacher: the two models, their weights loaded; None for methods that learn from the student alone.
        plan: what is asked.
        targets: the arguments of the student's forward -> ``Targets``; the adapter's, if left out.
        kind: the engine's own class, and ``engine`` its further arguments.

    Returns:
        The distillation, attached; None if the plan has no method.

    Raises:
        ConfigError: student, teacher and plan do not fit each other.
    """
    _check_plan(student, teacher, plan)
    alone = teacher is None
    if plan.methods == {}:
        if teacher is not None:
            _inherit(student, teacher, plan, kind.logger)
        return None
    teacher = teacher or student
    requests = _requests(student, plan)
    by_name = any(r.levels and (student.offered[0] == LOGITS or {LOGITS, CLASSES} & {*r.levels}) for r in requests)
    every = student.levels(student.offered, student=True) if by_name else {}
    taps_by = [taps_of(request, student, every) for request in requests] or [_taps_of_ready(student, plan)]
    taps = tuple(dict.fromkeys(tap for part in taps_by for tap in part))
    check_taps((*plan.taps, *taps), student, teacher)
    shapes = _shapes(student, teacher, taps)
    if student.named and teacher.named:
        check_names(shapes)
    shapes, classes = common_classes(student, teacher, shapes, plan.class_map, kind.logger)
    pairs_by = [_pairs(request, part, shapes, kind.logger) for request, part in zip(requests, taps_by)] or [
        pair_levels(shapes, taps, kind.logger, levels=plan.levels)
    ]
    paired = {s: t for part in pairs_by for s, t in part.items()}
    pairs = {s: paired[s] for s in shapes["student"] if s in paired}
    if teacher.named and (unused := [t for t in shapes["teacher"] if t not in pairs.values()]):
        kind.logger.warning("no level of the student is paired with %s of the teacher", ", ".join(unused))
    shapes = {
        "student": {s: shapes["student"][s] for s in pairs},
        "teacher": {t: shapes["teacher"][t] for t in pairs.values()},
    }
    method = _method(plan, requests, pairs_by, shapes)
    check_annotations(student, method)
    check_scores(teacher, method)
    if CLASSES in method.levels:
        check_class_heads(student, teacher)
    pixels = _pixels(student, teacher, kind.logger)
    network, extract = teacher.network(taps)
    if SCORES in method.needs:
        network, extract = scored(teacher, network, extract)
    cost: Any = {"precision": plan.teacher_precision, "compiled": plan.teacher_compile}
    frozen = NoTeacher() if alone else FrozenTeacher(network, pixels, extract, **cost)
    like = next(student.model.parameters(), None)
    if like is not None:
        method.to(like.device, like.dtype if like.is_floating_point() else None)
    if not alone:
        _inherit(student, teacher, plan, kind.logger)  # last: what was refused has changed nothing
    reader = student.reader(taps)
    built = kind(
        student=student.model,
        teacher=frozen,
        method=method,
        levels={s: pairs[s] for s in method.levels},
        shapes=shapes,
        classes=classes,
        reader=reader,
        student_side=student.network(taps),
        read_targets=targets or partial(student.targets, reader),
        schedule=plan.schedule,
        period=plan.period,
        **engine,
    )
    if plan.channels_last:
        for model in (student.model, network):  # without a teacher it is one model twice
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    kind.logger.info("distilling with %s on %s", _title(plan), ", ".join(f"{s} <- {pairs[s]}" for s in method.levels))
    for s in resized_levels(pairs, shapes):
        specs = {"student": shapes["student"][s], "teacher": shapes["teacher"][pairs[s]]}
        fine, coarse = sorted(specs, key=lambda role: specs[role].stride)
        kind.logger.info(
            "at %s the %s's map (stride %d) is resized to the %s's grid (stride %d)", s, fine, specs[fine].stride,
            coarse, specs[coarse].stride,
        )  # fmt: skip
    for request, part, levels in zip(requests, taps_by, pairs_by):
        kind.logger.info("%s", request.describe([*levels], part))
    return built


def _pixels(student: Adapter, teacher: Adapter, logger: logging.Logger) -> PixelTransform | None:
    """Return the way from the student's images to the teacher's; None where one of them does not say its own."""
    if student.pixels is None:
        return None
    if teacher.pixels is None:
        logger.warning(
            "the pixel statistics of the teacher, a %s, are unknown: it gets the student's normalised images as they "
            "are; say them by teacher_pixels, if they differ", teacher.name,
        )  # fmt: skip
        return None
    return PixelTransform(student.pixels, teacher.pixels)


def _title(plan: Plan) -> str:
    return " + ".join(plan.methods) if isinstance(plan.methods, Mapping) else type(plan.methods).__name__


def _check_plan(student: Adapter, teacher: Adapter | None, plan: Plan) -> None:
    if plan.inherit not in INHERIT:
        raise ConfigError("inherit", plan.inherit, f"one of {', '.join(INHERIT)}")
    if not isinstance(plan.period, int) or isinstance(plan.period, bool) or plan.period < 1:
        raise ConfigError("period", plan.period, ">= 1, a whole number")
    check_class_map(plan.class_map)
    unknown = [tap for tap in plan.taps if tap not in TAPS]
    if unknown or isinstance(plan.taps, str):
        raise ConfigError(
            "taps", plan.taps if isinstance(plan.taps, str) else unknown[0], f"a list of {', '.join(TAPS)}"
        )
    alone = _teacherless(plan)
    if alone and teacher is not None:
        hint = f"{_title(plan)} learns from the student alone: leave out {{teacher}}, or choose another {{method}}"
        raise ConfigError("teacher", teacher.name, "none", hint)
    if teacher is None and ((plan.methods != {} and not alone) or plan.inherit == "always"):
        raise ConfigError("teacher", "none", "a model to learn from", "or no {method} and {inherit} 'never'")
    model = student.model
    check_models(model, model if teacher is None else teacher.model, alone=teacher is None)
    if plan.methods == {}:
        return
    if isinstance(getattr(model, NAME, None), Distillation):
        raise ConfigError(
            "student", "one that has a distillation", "one without",
            "several methods are one call, as method='PKD+KD'; or student.distillation.remove() first",
        )  # fmt: skip
    if hasattr(model, NAME):
        raise ConfigError("student", f"an attribute {NAME} of its own", "none", "rename it: that name is needed")


def _teacherless(plan: Plan) -> bool:
    """Return True if there are methods, and none of them needs a teacher."""
    if isinstance(plan.methods, Distiller):
        return all(part.teacherless for part in plan.methods.parts())
    return bool(plan.methods) and all(DISTILLER_REGISTRY.get(name).teacherless for name in plan.methods)


def _inherit(student: Adapter, teacher: Adapter, plan: Plan, logger: logging.Logger) -> None:
    how = plan.inherit
    if how == "always" or (how == "auto" and student.kind is not None and student.kind == teacher.kind):
        foreign = foreign_class_layers(student, teacher, plan.class_map, logger)
        logger.info("%s", inherit(student.inheriting, teacher.inheriting, exclude=[student.trunk, *foreign]))
    elif how == "auto":
        logger.info("nothing is inherited: the student is a %s, the teacher a %s", student.name, teacher.name)


def _requests(student: Adapter, plan: Plan) -> list[Request]:
    """Return the settings of the plan's methods; none for a ready method."""
    if isinstance(plan.methods, Distiller):
        return []
    common = {"family": student.family, "levels": plan.levels, "taps": plan.taps}
    requests = [read_request(name, options, **common) for name, options in plan.methods.items()]  # type: ignore[arg-type]
    for request in requests:
        if request.method.families and student.family not in request.method.families:
            known = ", ".join(filter(None, request.method.families))
            kinds = "models that give one class to each image" if known == "classifier" else known
            raise ConfigError(
                "method", request.name, f"one that has a meaning for a {student.name}", f"{request.name} is for {kinds}"
            )
    used = {tap for request in requests for tap in request.method.reads}
    if unused := [tap for tap in plan.taps if tap not in used]:
        allowed = f"only {' and '.join(sorted(used))} with {' and '.join(plan.methods)}"
        raise ConfigError("taps", " and ".join(unused), allowed, "see {method}")
    return requests


def _taps_of_ready(student: Adapter, plan: Plan) -> tuple[str, ...]:
    assert isinstance(plan.methods, Distiller)
    reads = [part.reads for part in plan.methods.parts()]
    return tuple(plan.taps) or tuple(tap for tap in student.offered if any(tap in each for each in reads))


def _asked(request: Request, taps: Sequence[str], levels: Pyramid) -> tuple[str, ...]:
    """Return the levels asked for; of those given for all methods, the ones that this method's taps have."""
    if request.origins["levels"] != "given for all":
        return request.levels
    return tuple(level for level in request.levels if level not in levels or levels[level].tap in taps)


def _pairs(
    request: Request, taps: Sequence[str], shapes: Mapping[str, Pyramid], logger: logging.Logger
) -> dict[str, str]:
    """Pair the levels of one method; an error about its own levels names them."""
    levels = _asked(request, taps, shapes["student"])
    try:
        return pair_levels(shapes, taps, logger, levels=levels, recipe=request.recipe.levels)
    except ConfigError as error:
        if request.origins["levels"] == "given":
            raise error.of(request.name, CHOICES) from error
        raise


def _shapes(student: Adapter, teacher: Adapter, taps: Sequence[str]) -> dict[str, Pyramid]:
    side = student.side() or teacher.side()
    shapes = {"student": student.levels(taps, side=side, student=True)}
    try:
        return {**shapes, "teacher": teacher.levels(taps, side=side)}
    except RuntimeError as error:
        reason = first_line(error)
        raise ConfigError(
            "teacher", f"a failure on {side} x {side} pixels: {reason}", "one that takes the student's images"
        ) from error


def _method(
    plan: Plan, requests: Sequence[Request], pairs: Sequence[Mapping[str, str]], shapes: Mapping[str, Pyramid]
) -> Distiller:
    if isinstance(plan.methods, Mapping):
        student = [{s: shapes["student"][s] for s in part} for part in pairs]
        return build_distiller(
            requests, student, [{s: shapes["teacher"][t] for s, t in part.items()} for part in pairs]
        )
    unknown = [level for level in plan.methods.levels if level not in shapes["student"]]
    if unknown:
        raise ConfigError("method", f"level {unknown[0]}", f"levels among {', '.join(shapes['student'])}")
    return plan.methods
