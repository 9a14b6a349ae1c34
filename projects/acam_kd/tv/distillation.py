"""Weights from files, hyper-parameters from text, and the distillation of two torchvision models."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from ..core import DISTILLER_REGISTRY, ConfigError, Distillation, Plan, assemble, read_methods
from ..core.options import all_arguments, as_type
from ..core.renamed import current_arguments
from ..core.weights import load_file
from ..files import sha256
from ..yaml_file import load_yaml
from .adapter import adapt
from .classification import Classifier
from .models import plain
from .names import option
from .segmentation import Segmentor

__all__ = ["build_distillation", "load_weights", "normalized_batch", "parse_options"]

logger = logging.getLogger("acam_kd")


def load_weights(model: nn.Module, path: str, *, role: str) -> None:
    """Load a file into torchvision's own model, all of it or nothing.

    Args:
        model: from ``build_model``.
        path: a state dict in a file of torch's or safetensors', perhaps under a prefix; see ``core.weights``.
        role: ``"teacher"`` or ``"student"``, for messages.

    Raises:
        ConfigError: see ``core.weights.load_file``.
    """
    found = load_file(plain(model), path, argument=f"{role}_weights")
    under = f" under {found.prefix!r}" if found.prefix else ""
    logger.info("%s loaded: all %d tensors%s from %s (sha256 %s)", role, found.needed, under, path, sha256(path))


def parse_options(methods: str, pairs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Turn ``["alpha=2", ...]`` into, for every method, those of its settings that are given.

    Of several methods, as in ``"PKD+KD"``, a name begins with the method: ``PKD.alpha=2``, ``PKD.levels=p3,p4``.

    Raises:
        ConfigError: no such method, or a pair is malformed, its name unknown, or its value of another type.
    """
    names = read_methods(methods)
    known = {name: all_arguments(name) for name in names}
    options: dict[str, dict[str, Any]] = {name: {} for name in names}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        method, _, name = key.rpartition(".")
        method = next((own for own in names if own.lower() == method.lower()), method)
        if not method and len(names) == 1:
            method = names[0]
        renamed = DISTILLER_REGISTRY.get(method).renamed if method in known else {}
        if not equals or renamed.get(name, name) not in known.get(method, {}):
            raise ConfigError("options", pair, _allowed(known), "" if known else "choose a {method}")
        default = known[method][renamed.get(name, name)]
        value = _read(text, default)
        options[method][name] = None if value is None else as_type(default, f"{method}.{name}", value)
    return {
        method: current_arguments(DISTILLER_REGISTRY.get(method), given, names=option)
        for method, given in options.items()
    }


def _allowed(known: Mapping[str, Mapping[str, Any]]) -> str:
    """Describe the settings of the methods."""
    if not known:
        return "nothing without a method"
    prefix = len(known) > 1
    pairs = [
        f"{method + '.' if prefix else ''}{name}={value!r}"
        for method, arguments in known.items()
        for name, value in arguments.items()
    ]
    return f"NAME=VALUE with {', '.join(pairs)}"


def _read(text: str, default: Any) -> Any:
    """Return the value that a text means."""
    if isinstance(default, (str, tuple)) and text not in ("null", "None"):
        return text
    try:
        return None if text == "None" else load_yaml(text)
    except yaml.YAMLError:
        return text


def build_distillation(
    student: nn.Module,
    teacher: nn.Module | None,
    plan: Plan,
    *,
    student_class_names: Sequence[str] = (),
    teacher_class_names: Sequence[str] = (),
) -> Distillation | None:
    """Attach a distillation to a torchvision model; it inherits first.

    Args:
        student, teacher: from ``build_model``, their weights loaded.
        plan: see ``Plan``.
        student_class_names, teacher_class_names: one for each label; empty if they are unknown.

    Returns:
        The distillation, None without a method.

    Raises:
        ConfigError: the two do not fit each other or the plan, or a teacher is missing.
    """
    of_student, of_teacher = adapt(student), None if teacher is None else adapt(teacher)
    assert of_student is not None
    of_student.class_names = student_class_names
    if of_teacher is not None:
        of_teacher.class_names = teacher_class_names
    return assemble(of_student, of_teacher, plan)


def normalized_batch(student: nn.Module, images: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return the batch that the backbone gets for (3, H, W) images in [0, 1], and the size of each image in it."""
    if isinstance(student, (Segmentor, Classifier)):
        singles = [student.batch([image]).shape[-2:] for image in images]
        return student.batch(images), [(h, w) for h, w in singles]
    transform = student.transform
    assert isinstance(transform, GeneralizedRCNNTransform)
    training = transform.training
    batch, _ = transform.eval()(list(images))
    transform.train(training)
    return batch.tensors, [(h, w) for h, w in batch.image_sizes]
