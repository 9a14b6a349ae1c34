"""The assembly: from two adapters and a plan to a distillation, attached to the student. It is written once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from .adapter import Adapter
from .class_names import check_class_map
from .classes import common_classes, foreign_class_layers
from .distillation import NAME, Distillation
from .distiller import Distiller
from .errors import ConfigError, first_line
from .features import CLASSES, LOGITS, TAPS, Pyramid
from .inheritance import inherit
from .methods import build_distiller
from .options import Request, read_request
from .selection import check_taps, pair_levels, taps_of
from .targets import Targets
from .teacher import FrozenTeacher, PixelTransform

__all__ = ["INHERIT", "Plan", "assemble", "check_models"]

INHERIT = ("auto", "always", "never")


@dataclass(frozen=True)
class Plan:
    """The request for a distillation.

    Args:
        methods: name -> its settings: arguments of its constructor, ``levels``, ``taps``, where None leaves one open;
            or a ready ``Distiller``; empty for inheritance alone.
        levels: the student's levels to distil by every method that has none of its own; empty for those of its recipe,
            else for all whose stride the teacher has too.
        taps: some of ``TAPS``, likewise; empty for the recipe's, else for what the method can use first.
        inherit: whether the student's neck and head start from the teacher's: ``"always"``, ``"never"``, or
            ``"auto"``, if both are detectors of one kind.
        period: see ``Distillation``.
        teacher_precision, teacher_compile: see ``FrozenTeacher``.
        channels_last: the memory format of student, teacher and method.
        class_map: student's name of a class -> the teacher's, where they differ.
    """

    methods: Mapping[str, Mapping[str, Any]] | Distiller = field(default_factory=dict)
    levels: Sequence[str] = ()
    taps: Sequence[str] = ()
    inherit: str = "never"
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
        student, teacher: the two models, their weights loaded.
        plan: what is asked.
        targets: the arguments of the student's forward -> ``Targets``; the adapter's, if left out.
        kind: the engine's own class, and ``engine`` its further arguments.

    Returns:
        The distillation, attached; None if the plan has no method.

    Raises:
        ConfigError: student, teacher and plan do not fit each other.
    """
    _check_plan(student, teacher, plan)
    if teacher is None or plan.methods == {}:
        if teacher is not None:
            _inherit(student, teacher, plan, kind.logger)
        return None
    requests = _requests(student, plan)
    by_name = any({LOGITS, CLASSES} & {*request.levels} for request in requests)
    every = student.levels(student.offered, student=True) if by_name else {}
    taps_by = [taps_of(request, student, every) for request in requests] or [_taps_of_ready(student, plan)]
    taps = tuple(dict.fromkeys(tap for part in taps_by for tap in part))
    check_taps((*plan.taps, *taps), student, teacher)
    shapes = _shapes(student, teacher, taps)
    if student.named and teacher.named:
        _check_names(shapes)
    shapes, classes = common_classes(student, teacher, shapes, plan.class_map, kind.logger)
    pairs_by = [
        pair_levels(
            shapes, part, kind.logger, levels=_asked(request, part, shapes["student"]), recipe=request.recipe.levels
        )
        for request, part in zip(requests, taps_by)
    ] or [pair_levels(shapes, taps, kind.logger, levels=plan.levels)]
    paired = {s: t for part in pairs_by for s, t in part.items()}
    pairs = {s: paired[s] for s in shapes["student"] if s in paired}
    if teacher.named and (unused := [t for t in shapes["teacher"] if t not in pairs.values()]):
        kind.logger.warning("no level of the student is paired with %s of the teacher", ", ".join(unused))
    shapes = {
        "student": {s: shapes["student"][s] for s in pairs},
        "teacher": {t: shapes["teacher"][t] for t in pairs.values()},
    }
    method = _method(plan, requests, pairs_by, shapes)
    _check_annotations(student, method)
    if CLASSES in method.levels:
        _check_class_heads(student, teacher)
    pixels = None
    if student.pixels is not None and teacher.pixels is not None:
        pixels = PixelTransform(student.pixels, teacher.pixels)
    network, extract = teacher.network(taps)
    frozen = FrozenTeacher(network, pixels, extract, precision=plan.teacher_precision, compiled=plan.teacher_compile)
    like = next(student.model.parameters(), None)
    if like is not None:
        method.to(like.device, like.dtype if like.is_floating_point() else None)
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
        period=plan.period,
        **engine,
    )
    if plan.channels_last:
        for model in (student.model, network):
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    kind.logger.info("distilling with %s on %s", _title(plan), ", ".join(f"{s} <- {pairs[s]}" for s in method.levels))
    for request, part, levels in zip(requests, taps_by, pairs_by):
        kind.logger.info("%s", request.describe([*levels], part))
    return built


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
    if teacher is None and (plan.methods != {} or plan.inherit == "always"):
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


def check_models(student: Any, teacher: Any, *, alone: bool = False) -> None:
    """Raise ConfigError for a student or a teacher that cannot be one.

    Args:
        student, teacher: the two models.
        alone: there is no teacher.
    """
    for role, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module):
            raise ConfigError(role, type(model).__name__, "an nn.Module", "build it first, and load its weights")
    if isinstance(student, torch.jit.ScriptModule):
        raise ConfigError("student", type(student).__name__, "an nn.Module in Python", "attach before scripting")
    for wrapper in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule"):
        if any(cls.__name__ == wrapper for cls in type(student).__mro__):
            raise ConfigError("student", wrapper, "the model inside of it", "attach the distillation, then wrap")
    if alone:
        return
    if teacher is student:
        raise ConfigError("teacher", "the student itself", "another model, as copy.deepcopy(student)")
    trained = {id(p) for p in student.parameters() if p.requires_grad}
    if any(id(p) in trained for p in teacher.parameters()):
        raise ConfigError(
            "teacher", "parameters that the student trains", "a model with parameters of its own",
            "copy.deepcopy what the two share",
        )  # fmt: skip


def _inherit(student: Adapter, teacher: Adapter, plan: Plan, logger: logging.Logger) -> None:
    how = plan.inherit
    if how == "always" or (how == "auto" and student.kind is not None and student.kind == teacher.kind):
        foreign = foreign_class_layers(student, teacher, plan.class_map, logger)
        logger.info("%s", inherit(student.inheriting, teacher.inheriting, exclude=[student.trunk, *foreign]))
    elif how == "auto":
        logger.info("nothing is inherited: the student is %s, the teacher %s", student.kind, teacher.kind)


def _requests(student: Adapter, plan: Plan) -> list[Request]:
    """Return the settings of the plan's methods; none for a ready method."""
    if isinstance(plan.methods, Distiller):
        return []
    common = {"family": student.family, "levels": plan.levels, "taps": plan.taps}
    requests = [read_request(name, options, **common) for name, options in plan.methods.items()]  # type: ignore[arg-type]
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


def _check_names(shapes: Mapping[str, Pyramid]) -> None:
    """Raise ConfigError for levels that both sides call by one name and that have different strides."""
    for name, spec in shapes["student"].items():
        other = shapes["teacher"].get(name, spec)
        if other.stride != spec.stride and not (spec.logits and other.logits):  # maps of logits are resized
            raise ConfigError(
                "teacher_levels", f"{name} of stride {other.stride}", f"the student's stride, {spec.stride}",
                "choose parts of one stride, or give them different names",
            )  # fmt: skip


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


def _check_annotations(student: Adapter, method: Distiller) -> None:
    for part in method.parts():
        missing = [need for need in part.needs if need not in student.annotations]
        if missing and not (missing == ["labels"] and all(level == CLASSES for level in part.levels)):
            raise ConfigError(
                "method", type(part).__name__, f"one that needs no {' and '.join(missing)}",
                f"a {student.name} is trained without any",
            )  # fmt: skip


def _check_class_heads(student: Adapter, teacher: Adapter) -> None:
    anchors = student.anchors(), teacher.anchors()
    names = f"a {teacher.name}", f"like the student's, a {student.name}'s"
    if (anchors[0] is None) != (anchors[1] is None):
        raise ConfigError(
            "teacher",
            f"{names[0]}, which predicts {'regions' if anchors[1] is None else 'anchors'}",
            f"a class head {names[1]}",
            "see {method}",
        )
    if type(student) is not type(teacher):
        raise ConfigError("teacher", f"{names[0]} of another framework", "class heads of one framework", "see {method}")
    if student.box_dimension != teacher.box_dimension:
        raise ConfigError(
            "teacher",
            f"boxes of {teacher.box_dimension} numbers",
            f"the student's {student.box_dimension}",
            "rotated and axis-aligned regions do not correspond",
        )
    if anchors[0] is not None and anchors[1] is not None and not _same(anchors[0], anchors[1]):
        raise ConfigError(
            "teacher",
            f"{names[0]} with other anchors",
            f"anchors {names[1]}",
            "classes of other anchors do not correspond; see {method}",
        )


def _same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    """Compare anchors up to the rounding of a config file."""
    if len(a) != len(b):
        return False
    return all(
        x.shape == y.shape and (x.is_meta or torch.allclose(x.cpu(), y.cpu(), rtol=0, atol=0.1)) for x, y in zip(a, b)
    )
