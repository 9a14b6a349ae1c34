"""From settings to models, and the evaluation of a finished one."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core import ConfigError, Plan
from ..core.class_names import read_class_map
from ..core.options import all_arguments, note_own
from ..core.weighting import WeightSchedule
from ..data.splits import Split
from ..files import write_atomically
from ..report.confusion import draw_confusion
from .card import Card, read_card
from .class_evaluation import ClassificationEvaluator
from .class_images import ClassImages
from .class_names import names_of_labels, names_of_weights, with_background
from .classification import Classifier
from .data import Images
from .distillation import build_distillation, load_weights, parse_options
from .evaluation import evaluated
from .labels import load_data
from .models import build_model, is_model, needs_pairs
from .run import Settings
from .segmentation import Segmentor
from .trunk import TrunkSettings, set_pixels, set_up

__all__ = ["Models", "build", "build_models", "evaluate", "load_model", "load_teacher"]


@dataclass(frozen=True)
class Models:
    """The models of a run.

    Args:
        student: with its distillation attached if there is a method.
        teacher: None if the run needs none.
        comparable: the teacher knows the classes of the data, so it can be evaluated on them.
    """

    student: nn.Module
    teacher: nn.Module | None
    comparable: bool


def load_model(
    name: str,
    weights: str,
    *,
    num_classes: int | None,
    size: int | None,
    role: str,
    backbone_weights: str = "",
    pixels: tuple[Sequence[float], Sequence[float]] = ((), ()),
) -> tuple[nn.Module, Card | None]:
    """Load a model by the folder of a finished run, or by its name; see ``Settings`` for both.

    Args:
        name, weights, num_classes, size, backbone_weights: see ``Settings`` and ``build_model``.
        role: ``"student"`` or ``"teacher"``.
        pixels: mean and deviation; empty for those of the run in the folder, or of torchvision's model.

    Returns:
        The model, and what its run's folder says about it.
    """
    if Path(name).is_dir():
        if backbone_weights:
            raise ConfigError(f"{role}_backbone_weights", backbone_weights, f"none: the folder {name} has weights")
        card, path = read_card(name, argument=role)
        with _arguments_of(role):
            model = build_model(card.name, num_classes=card.num_classes, size=size or card.size)
        set_pixels(model, pixels[0] or card.pixel_mean, pixels[1] or card.pixel_std)
        load_weights(model, weights or str(path), role=role)
        return model, card
    if os.sep in name:
        raise ConfigError(role, f"{name}, where no folder is", "the folder of a finished run, or a model's name")
    is_file = _is_file(weights)
    if role == "student" and weights and not is_file:
        _check_classes_of(name, weights, num_classes)
    with _arguments_of(role):
        model = build_model(
            name,
            num_classes=num_classes,
            size=size,
            weights=None if is_file else weights or None,
            backbone_weights=None if _is_file(backbone_weights) else backbone_weights or None,
        )
    set_pixels(model, *pixels)
    if is_file:
        load_weights(model, weights, role=role)
    return model, None


def _is_file(weights: str) -> bool:
    """Tell a file from a name of torchvision's."""
    return bool(weights) and (Path(weights).exists() or not weights.replace("_", "").isalnum())


@contextmanager
def _arguments_of(role: str) -> Iterator[None]:
    """Raise the errors of ``build_model`` anew under the names that its arguments have for student or teacher."""
    names = {"name": role, "weights": f"{role}_weights", "backbone_weights": f"{role}_backbone_weights"}
    try:
        yield
    except ConfigError as error:
        hint = error.hint if role == "student" else ""  # a teacher has no weights of the backbone alone
        for name, argument in names.items():
            hint = hint.replace(f"{{{name}}}", f"{{{argument}}}")
        raise ConfigError(names.get(error.argument, error.argument), error.value, error.allowed, hint) from error


def build(settings: Settings, data: Images) -> nn.Module:
    """Build the student of a run, with its distillation; see ``build_models``."""
    return build_models(settings, data).student


def build_models(settings: Settings, data: Images, *, world: int = 1) -> Models:
    """Build the student of a run and its teacher, and attach the distillation that it asks for.

    Args:
        settings: see ``card.resolved``.
        data: to train on.
        world: the number of processes that share a batch.

    Raises:
        ConfigError: see ``load_model`` and ``build_distillation``; or the student knows other classes than the data
            has, or the teacher has no weights.
    """
    methods = _of_run(parse_options(settings.method, settings.options), settings, len(data))
    trunk = _trunk(settings)
    student, card = load_model(
        settings.student,
        settings.student_weights,
        num_classes=data.num_classes,
        size=settings.size,
        role="student",
        backbone_weights=settings.student_backbone_weights,
        pixels=(settings.pixel_mean, settings.pixel_std),
    )
    set_up(student, trunk)
    if card:
        _check_categories(settings.student, card, data)
    if needs_pairs(settings.student_name) and settings.batch_size // world < 2:
        hint = "DeepLabV3 and SSDLite normalise maps of one pixel over the batch"
        raise ConfigError("batch_size", settings.batch_size, "2 images a device at least", hint)
    teacher, names = load_teacher(settings, data)
    plan = Plan(
        methods=methods,
        levels=settings.levels,
        taps=settings.taps,
        inherit=settings.inherit,
        schedule=WeightSchedule(
            settings.weight, settings.share, warmup=settings.warmup_iters, stop_at=settings.stop_at
        ),
        period=settings.distill_period,
        teacher_precision=settings.teacher_precision,
        teacher_compile=settings.teacher_compile,
        channels_last=settings.channels_last,
        class_map=read_class_map(settings.class_map),
    )
    own = names_of_labels(data.categories, data.num_classes)
    distillation = build_distillation(student, teacher, plan, student_class_names=own, teacher_class_names=names)
    if distillation is None and settings.channels_last:
        student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    same = not names or list(names) == list(own)
    classes = len(names_of_weights(settings.teacher, settings.teacher_weights)) or settings.teacher_classes
    same = same and classes in (0, data.num_classes)
    same = same and isinstance(teacher, Classifier) == isinstance(data, ClassImages)
    return Models(student, teacher, same and isinstance(teacher, Segmentor) == data.semantic)


def _of_run(methods: dict[str, dict[str, Any]], settings: Settings, images: int) -> dict[str, dict[str, Any]]:
    """Fill in the number of epochs for methods that ask for it, where it is not given."""
    epochs = math.ceil(settings.iterations * settings.batch_size / max(images, 1))
    for name, given in methods.items():
        if "epochs" in all_arguments(name) and not given.get("epochs"):
            given["epochs"] = epochs
            note_own(name, "epochs", str(epochs))
    return methods


def _trunk(settings: Settings) -> TrunkSettings:
    """Return what is done to the student's trunk.

    Raises:
        ConfigError: an order of channels is given without a file, or a file beside weights of the whole student, or
            something is frozen at a random start.
    """
    weights, order = settings.student_backbone_weights, settings.student_backbone_order
    file = weights if _is_file(weights) else ""
    if not file and order != "RGB":
        raise ConfigError("student_backbone_order", order, "RGB without a file", "give {student_backbone_weights}")
    if file and settings.student_weights:
        hint = "choose one of {student_weights} and {student_backbone_weights}"
        raise ConfigError("student_backbone_weights", file, "none beside weights of the whole student", hint)
    if not (weights or settings.student_weights or Path(settings.student).is_dir()):
        for argument, value in (("freeze_stages", settings.freeze_stages), ("freeze_norm", settings.freeze_norm)):
            if value and value != "trained":
                hint = "give {student_backbone_weights}"
                raise ConfigError(argument, value, "nothing frozen without weights: a random start would stay", hint)
    return TrunkSettings(file, order, settings.freeze_stages, settings.freeze_norm)


def load_teacher(settings: Settings, data: Images) -> tuple[nn.Module | None, list[str]]:
    """Return the teacher that a run needs, with its weights, and the names of its classes if they are known."""
    if not settings.teacher or not (settings.method or settings.pseudo_labels or settings.inherit != "never"):
        return None, []
    if not Path(settings.teacher).is_dir() and not settings.teacher_weights:
        if not is_model(settings.teacher):
            value = f"{settings.teacher}, which is neither a folder nor the name of a model"
            hint = "with a name give {teacher_weights}"
            raise ConfigError("teacher", value, "the folder of a finished run, or a name", hint)
        raise ConfigError(
            "teacher", f"{settings.teacher} without weights", "the folder of a finished run, or a name",
            "with a name give {teacher_weights}: a file or DEFAULT",
        )  # fmt: skip
    names = with_background(settings.teacher_class_names, settings.teacher)
    classes = settings.teacher_classes or len(names) or data.num_classes
    with torch.random.fork_rng(devices=[]):  # what the teacher draws for its start must not move the student
        teacher, card = load_model(
            settings.teacher, settings.teacher_weights, num_classes=classes, size=None, role="teacher"
        )
    if card:
        names = with_background(settings.teacher_class_names, card.name)
        return teacher, names or names_of_labels(card.categories, card.num_classes)
    return teacher, names or names_of_weights(settings.teacher, settings.teacher_weights)


def _check_classes_of(name: str, weights: str, num_classes: int | None) -> None:
    """Raise ConfigError for weights of torchvision that were trained on another number of classes."""
    known = len(names_of_weights(name, weights))
    if known and num_classes not in (None, known):  # build_model says what is wrong with unknown ones
        raise ConfigError(
            "student_weights", f"{weights} of {name} for {known} classes with the background",
            f"the data's {num_classes}",
            "start from {student_backbone_weights}",
        )  # fmt: skip


def _check_categories(folder: str, card: Card, data: Images) -> None:
    if card.categories != data.categories:
        raise ConfigError("student", f"{folder} with the categories {card.categories}", f"the data's {data.categories}")


def evaluate(
    student: str,
    weights: str,
    split: Split,
    *,
    size: int | None = None,
    batch_size: int = 8,
    workers: int = 0,
    confusion: str = "",
) -> dict[str, float]:
    """Evaluate a finished run's student, or a model by its name and weights, on a dataset.

    Args:
        student, weights, size: see ``load_model``.
        split: the data.
        batch_size, workers: of the loader.
        confusion: the file of a picture of a classifier's confusions; empty for none.

    Raises:
        ConfigError: see ``load_model``; or a picture is asked for of another kind of data.
    """
    name = read_card(student, argument="student")[0].name if Path(student).is_dir() else student
    data = load_data(split, name, name="validation data")
    if confusion and not isinstance(data, ClassImages):
        raise ConfigError("confusion", "data with boxes or masks", "data with a class for each image")
    if not weights and not Path(student).is_dir():
        raise ConfigError(
            "student", f"{student} without weights", "the folder of a finished run", "or give {student_weights}"
        )
    model, card = load_model(student, weights, num_classes=data.num_classes, size=size, role="student")
    if card:
        _check_categories(student, card, data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    evaluator = evaluated(model, data, device, batch_size=batch_size, workers=workers)
    if confusion and isinstance(evaluator, ClassificationEvaluator):
        write_atomically(Path(confusion), draw_confusion(evaluator.confusion(), [*data.categories.values()]))
    return evaluator.metrics()
