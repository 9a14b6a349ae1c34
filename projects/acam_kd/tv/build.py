"""From settings to models, and the evaluation of a finished one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torchvision.models import get_model_weights

from ..core import CLASSES, LOGITS, DistillationModel, read_methods
from ..data.splits import Split
from .data import Images, evaluation_loader
from .distillation import build_distillation, load_weights, parse_options
from .evaluation import build_evaluator
from .labels import load_data
from .models import build_model
from .run import Card, Settings, read_card
from .taps import read_taps

__all__ = ["build", "evaluate", "load_model"]


def load_model(
    name: str, weights: str, *, num_classes: int | None, size: int | None, role: str, backbone_weights: str = ""
) -> tuple[nn.Module, Card | None]:
    """A model by the folder of a finished run, or by its name; see ``Settings`` for both.

    Returns:
        The model, and what its run's folder says about it.
    """
    if Path(name).is_dir():
        if backbone_weights:
            raise ValueError(f"{name} has weights; --{role}-backbone-weights are for a name")
        card, path = read_card(name)
        model = build_model(card.name, num_classes=card.num_classes, size=size or card.size)
        load_weights(model, weights or str(path), role=role)
        return model, card
    is_file = bool(weights) and (Path(weights).exists() or not weights.replace("_", "").isalnum())
    if role == "student" and weights and not is_file:
        _check_classes_of(name, weights, num_classes)
    model = build_model(
        name,
        num_classes=num_classes,
        size=size,
        weights=None if is_file else weights or None,
        backbone_weights=backbone_weights or None,
    )
    if is_file:
        load_weights(model, weights, role=role)
    return model, None


def build(settings: Settings, data: Images) -> DistillationModel:
    """Student, teacher and method of a run.

    Args:
        settings: ``resolved``.
        data: to train on.

    Raises:
        ValueError: what ``load_model`` and ``build_distillation`` refuse, a student that knows other classes than the
            data has, or a teacher without weights.
    """
    methods = parse_options(settings.method, settings.options)
    student, card = load_model(
        settings.student,
        settings.student_weights,
        num_classes=data.num_classes,
        size=settings.size,
        role="student",
        backbone_weights=settings.student_backbone_weights,
    )
    if card:
        _check_categories(settings.student, card, data)
    if settings.student_name.startswith("deeplabv3") and settings.batch_size // settings.devices < 2:
        raise ValueError("DeepLabV3 normalises over the batch: 2 images a device are needed at least (--batch-size)")
    teacher = _teacher(settings, student, data)
    model = build_distillation(
        student,
        teacher,
        methods=methods,
        inheritance=settings.inherit,
        levels=settings.levels,
        taps=settings.taps,
        period=settings.distill_period,
        teacher_precision=settings.teacher_precision,
        teacher_compile=settings.teacher_compile,
    )
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _teacher(settings: Settings, student: nn.Module, data: Images) -> nn.Module | None:
    """The teacher that a run needs, with its weights."""
    if not settings.teacher or (not settings.method and settings.inherit == "never"):
        return None
    if not settings.teacher_weights and not Path(settings.teacher).is_dir():
        raise ValueError(
            f"the teacher {settings.teacher} has no weights: give the folder of a finished run, or a name with "
            "--teacher-weights FILE or DEFAULT"
        )
    with torch.random.fork_rng(devices=[]):  # what the teacher draws for its start must not move the student
        classes = settings.teacher_classes or data.num_classes
        teacher, card = load_model(
            settings.teacher, settings.teacher_weights, num_classes=classes, size=None, role="teacher"
        )
    methods = read_methods(settings.method)
    if card and methods and {LOGITS, CLASSES} & {*read_taps(settings.taps, methods, student, teacher)}:
        _check_categories(settings.teacher, card, data, hint=", and their predictions need the same (--taps)")
    return teacher


def _check_classes_of(name: str, weights: str, num_classes: int | None) -> None:
    """Weights of torchvision know the classes that they were trained on."""
    try:
        known = len(getattr(get_model_weights(name), weights).meta["categories"])
    except (ValueError, AttributeError):
        return  # build_model says what is wrong
    if num_classes not in (None, known):
        raise ValueError(
            f"{name}'s weights {weights} know {known} classes with the background, the data has {num_classes}: start "
            "from --student-backbone-weights"
        )


def _check_categories(folder: str, card: Card, data: Images, *, hint: str = "") -> None:
    if card.categories != data.categories:
        raise ValueError(f"{folder} knows the categories {card.categories}, the data has {data.categories}{hint}")


def evaluate(
    student: str, weights: str, split: Split, *, size: int | None = None, batch_size: int = 8, workers: int = 0
) -> dict[str, float]:
    """Evaluate a finished run's student, or a model by its name and weights, on a dataset."""
    name = read_card(student)[0].name if Path(student).is_dir() else student
    data = load_data(split, name, name="validation data")
    if not weights and not Path(student).is_dir():
        raise ValueError(f"{student} has no weights (option: --student-weights; or give the folder of a finished run)")
    model, card = load_model(student, weights, num_classes=data.num_classes, size=size, role="student")
    if card:
        _check_categories(student, card, data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    evaluator = build_evaluator(data)
    with torch.inference_mode():
        for images, targets in evaluation_loader(data, batch_size=batch_size, workers=workers):
            evaluator.add(model([image.to(device) for image in images]), targets)
    return evaluator.metrics()
