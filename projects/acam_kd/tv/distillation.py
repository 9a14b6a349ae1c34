"""From two torchvision models to one ``DistillationModel``."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from ..core import (
    CLASSES,
    DISTILLER_REGISTRY,
    LOGITS,
    DistillationModel,
    FrozenTeacher,
    PixelTransform,
    build_distiller,
    inherit,
    match_levels,
    method_arguments,
    read_methods,
)
from ..core.features import Pyramid
from ..core.methods import check_boxes_known, check_taps_used
from ..errors import options_for_keys
from ..files import sha256
from .class_heads import backbone_and_classes, check_class_heads, class_head
from .models import plain
from .segmentation import Segmentor
from .taps import backbone_and_logits, logits_module, pyramid, read_taps, side_of
from .targets import ReadTargets

__all__ = ["INHERIT", "build_distillation", "load_weights", "normalized_batch", "parse_options"]

logger = logging.getLogger("acam_kd")

INHERIT = ("auto", "always", "never")


def load_weights(model: nn.Module, path: str, *, role: str) -> None:
    """Load a file into torchvision's own model, all of it or nothing.

    Args:
        model: from ``build_model``.
        path: a state dict as ``torch.save`` writes it, or torchvision's recipes, which put it under ``model``.
        role: ``"teacher"`` or ``"student"``, for messages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no state dict, or a tensor is missing, superfluous or of another shape.
    """
    option = f"(option: --{role}-weights)"
    if not os.path.isfile(path):
        raise FileNotFoundError(f"the {role}'s weights do not exist: tried {os.path.abspath(path)} {option}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch and pickle make of a file that is no checkpoint
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the {role}'s weights {path} cannot be loaded: {reason} {option}") from error
    if isinstance(state, Mapping) and isinstance(state.get("model"), Mapping):
        state = state["model"]
    own = plain(model).state_dict()
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"the {role}'s weights {path} are no dict of tensors {option}")
    # A counter that frozen batch normalisation has not; torch fills it in.
    names = [{n for n in names if not n.endswith("num_batches_tracked")} for names in (own, state)]
    wrong = [f"{name} missing in the file" for name in own if name in names[0] - names[1]]
    wrong += [f"{name} unknown to the model" for name in state if name in names[1] - names[0]]
    wrong += [
        f"{name} is {tuple(state[name].shape)} in the file, {tuple(tensor.shape)} in the model"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"the {role}'s weights {path} are not this model's {option}: {'; '.join(wrong[:4])}{more}")
    plain(model).load_state_dict(dict(state))
    logger.info("%s loaded: all %d tensors from %s (sha256 %s)", role, len(own), path, sha256(path))


@options_for_keys()
def parse_options(methods: str, pairs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``["alpha=2", ...]`` -> for every method the arguments of its constructor, with the types of its defaults.

    Of several methods, as in ``"PKD+KD"``, a name begins with the method: ``PKD.alpha=2``.

    Raises:
        KeyError: no such method.
        ValueError: a pair is malformed, its name unknown, or its value of another type.
    """
    names = read_methods(methods)
    known = {name: method_arguments(DISTILLER_REGISTRY.get(name)) for name in names}
    options: dict[str, dict[str, Any]] = {name: {} for name in names}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        method, _, name = key.rpartition(".")
        method = next((own for own in names if own.lower() == method.lower()), method)
        if not method and len(names) == 1:
            method = names[0]
        if not equals or name not in known.get(method, {}):
            raise ValueError(f"--set {pair}: {_allowed(known)}")
        default = known[method][name]
        value = _read(text, default)
        if type(value) is not type(default):
            raise ValueError(f"--set {pair}: {type(default).__name__} is needed, as {name}={default!r}")
        options[method][name] = value
    return options


def _allowed(known: Mapping[str, Mapping[str, Any]]) -> str:
    """What ``--set`` takes."""
    if len(known) == 1:
        ((method, arguments),) = known.items()
        return f"{method} knows {', '.join(f'{name}={value!r}' for name, value in arguments.items()) or 'nothing'}"
    pairs = [f"{method}.{name}={value!r}" for method, arguments in known.items() for name, value in arguments.items()]
    return f"known are {', '.join(pairs)}" if known else "no method knows nothing, without a method"


def _read(text: str, default: Any) -> Any:
    """A value of the default's type, or whatever else the text means."""
    if isinstance(default, str):
        return text
    try:
        return float(text) if isinstance(default, float) else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return text


@options_for_keys()
def build_distillation(
    student: nn.Module,
    teacher: nn.Module | None,
    *,
    methods: Mapping[str, Mapping[str, Any]],
    inheritance: str = "auto",
    levels: Sequence[str] = (),
    taps: Sequence[str] = (),
    period: int = 1,
    teacher_precision: str = "",
    teacher_compile: bool = False,
) -> DistillationModel:
    """Put student, frozen teacher and method together; the student inherits first.

    Args:
        student, teacher: from ``build_model``, their weights loaded.
        methods: names in ``DISTILLER_REGISTRY`` -> arguments of their constructors; empty for none.
        inheritance: whether the student's neck and head start from the teacher's weights: ``"always"``, ``"never"``,
            or ``"auto"``, if both are detectors of one class: the paper's segmentation models inherit nothing.
        levels: the student's levels to distil; empty for all whose stride the teacher has too.
        taps: where both are tapped, see ``read_taps``.
        period: see ``DistillationModel``.
        teacher_precision, teacher_compile: see ``FrozenTeacher``.

    Raises:
        ValueError: the two have no levels in common or predict other numbers of classes, or a teacher is missing.
    """
    if inheritance not in INHERIT:
        raise ValueError(f"inheritance must be one of {', '.join(INHERIT)}, not {inheritance!r} (option: --inherit)")
    if teacher is None:
        if methods or inheritance == "always":
            raise ValueError("there is no teacher (options: --teacher, or --method none --inherit never for none)")
        return DistillationModel(student=student, teacher=None, distiller=None, levels={})
    _inherit(student, teacher, inheritance)
    if not methods:
        return DistillationModel(student=student, teacher=None, distiller=None, levels={})
    if isinstance(student, Segmentor):
        check_boxes_known(methods, type(plain(student)).__name__)
    taps = read_taps(taps, list(methods), student, teacher)
    check_taps_used(taps, list(methods))
    own, other, pairs = _matched(student, teacher, levels, taps)
    logger.info("distilling with %s on %s", " + ".join(methods), ", ".join(f"{s} <- {t}" for s, t in pairs.items()))
    distiller = build_distiller(methods, {s: own[s] for s in pairs}, {s: other[t] for s, t in pairs.items()})
    built: dict[str, Any] = {"student": student, "distiller": distiller, "period": period}
    built["levels"] = {s: pairs[s] for s in distiller.levels}
    if distiller.needs:
        built["read_targets"] = ReadTargets(student)
    transform = _pixel_transform(student, teacher)
    how: dict[str, Any] = {"precision": teacher_precision, "compiled": teacher_compile}
    if CLASSES in pairs:
        check_class_heads(student, teacher)
        frozen = FrozenTeacher(teacher, transform, backbone_and_classes, **how)
        return DistillationModel(**built, teacher=frozen, class_head=class_head(student))
    if LOGITS not in taps:
        frozen = FrozenTeacher(teacher.backbone, transform, **how)  # type: ignore[arg-type]  # the heads are let go
        return DistillationModel(**built, teacher=frozen)
    frozen = FrozenTeacher(plain(teacher), transform, backbone_and_logits, **how)
    return DistillationModel(**built, teacher=frozen, logits=logits_module(student), extract=backbone_and_logits)


def _inherit(student: nn.Module, teacher: nn.Module, inheritance: str) -> None:
    detectors = not isinstance(student, Segmentor)
    if inheritance == "always" or (inheritance == "auto" and detectors and type(student) is type(teacher)):
        logger.info("%s", inherit(plain(student), plain(teacher), exclude=[_backbone_proper(student)]))
    else:
        logger.info("nothing is inherited from the teacher")


def _matched(
    student: nn.Module, teacher: nn.Module, levels: Sequence[str], taps: Sequence[str]
) -> tuple[Pyramid, Pyramid, dict[str, str]]:
    """Both pyramids, and which of their levels belong together."""
    side = side_of(student)
    try:
        own, other = pyramid(student, side, taps), pyramid(teacher, side, taps)
        return own, other, match_levels(own, other, levels)
    except RuntimeError as error:
        raise ValueError(f"student and teacher do not take images of one size, {side} x {side}: {error}") from error


def _backbone_proper(model: nn.Module) -> str:
    """Prefix of the tensors that are not inherited; the FPN is a part of torchvision's ``backbone``."""
    return "backbone.body." if isinstance(model.backbone, BackboneWithFPN) else "backbone."


def _pixel_transform(student: nn.Module, teacher: nn.Module) -> PixelTransform:
    own, other = _statistics(student), _statistics(teacher)
    return PixelTransform(student_mean=own[0], student_std=own[1], teacher_mean=other[0], teacher_std=other[1])


def _statistics(model: nn.Module) -> tuple[list[float], list[float]]:
    holder: Any = model if isinstance(model, Segmentor) else model.transform
    return holder.image_mean, holder.image_std


def normalized_batch(student: nn.Module, images: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """What the student's backbone gets for (3, H, W) images in [0, 1]: the batch, and each image's part of it."""
    if isinstance(student, Segmentor):
        singles = [student.batch([image]).shape[-2:] for image in images]
        return student.batch(images), [(h, w) for h, w in singles]
    transform = student.transform
    assert isinstance(transform, GeneralizedRCNNTransform)
    training = transform.training
    batch, _ = transform.eval()(list(images))
    transform.train(training)
    return batch.tensors, [(h, w) for h, w in batch.image_sizes]
