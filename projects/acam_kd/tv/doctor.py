"""A look at the set-up of a run of torchvision's models before it starts."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor

from ..report.health import Examination, Part, version_findings
from ..report.one_step import look_at_step
from ..report.samples import spread
from .build import Models, build_models
from .card import resolved
from .data import Images, Stream, training_loader
from .defaults import scaled
from .labels import load_data
from .names import option
from .norms import enough_values
from .run import Settings
from .teacher_check import POOR, check_teacher

__all__ = ["doctor"]

TEACHER_IMAGES = 10
GET = "not installed; only train_net.py needs it: see Set-up in README.md"


def doctor(settings: Settings, *, whole: bool = False) -> Examination:
    """Look at a set-up: versions, devices, data, models, their pairing, the teacher's metric, and one step.

    Args:
        settings: of the run that is to be.
        whole: evaluate the teacher on all validation images, and not on ten.
    """
    looked = Examination(option)
    with looked.part("versions") as part:
        version_findings(part)
        found = importlib.util.find_spec("detectron2")
        part.ok("Detectron2 found" if found else f"Detectron2: {GET}")
    with looked.part("device") as part:
        device = _device(part)
    data: list[Images] = []
    with looked.part("data") as part, looked.logged(part, logging.getLogger("acam_kd")):
        settings = resolved(settings)
        data = [_load(settings.train_split, settings, "training", part)]
        data.append(_load(settings.val_split, settings, "validation", part))
        settings = scaled(settings, len(data[0]))
        part.ok(f"{settings.iterations} iterations of {settings.batch_size} images, rate {settings.learning_rate:.3g}")
    if len(data) < 2:
        return looked
    models = None
    with looked.part("models") as part, looked.logged(part, logging.getLogger("acam_kd")):
        models = build_models(settings, data[0])
        _pixels(part, models, data[1])
    if models is None:
        return looked
    if models.teacher is not None:
        with looked.part("teacher") as part, looked.logged(part, logging.getLogger("acam_kd")):
            _teacher(part, models, data[1], device, count=len(data[1]) if whole else TEACHER_IMAGES)
    with looked.part("one step") as part, looked.logged(part, logging.getLogger("acam_kd")):
        batch = _batch(settings, data[0], device)
        with enough_values("one step"):
            look_at_step(part, models.student.to(device).train(), *batch, names=option)
    return looked


def _device(part: Part) -> torch.device:
    if not torch.cuda.is_available():
        part.look("no GPU: a long run on a CPU takes days; --precision is of no use")
        return torch.device("cpu")
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    half = "bf16-mixed and 16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    part.ok(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {memory:.0f} GiB; --precision {half}")
    return torch.device("cuda")


def _load(split: Any, settings: Settings, name: str, part: Part) -> Images:
    crop = settings.crop if name == "training" else None
    data = load_data(split, settings.student_name, name=f"{name} data", crop=crop)
    part.ok(f"{name}: {len(data)} images, {len(data.categories)} classes")
    return data


def _pixels(part: Part, models: Models, data: Images) -> None:
    """Compare the statistics of pixels that the models take off with those of a few images."""
    sample = torch.cat([data[index][0].flatten(1) for index in spread(len(data), TEACHER_IMAGES)], 1)
    mean = [round(float(value), 2) for value in sample.mean(1)]
    part.ok(f"mean of {TEACHER_IMAGES} images, RGB in [0, 1]: {mean}")
    for role, model in (("student", models.student), ("teacher", models.teacher)):
        owner: Any = getattr(model, "transform", model)
        if model is not None:
            part.ok(f"{role}: mean {_short(owner.image_mean)}, deviation {_short(owner.image_std)}, RGB")


def _short(values: Any) -> list[float]:
    return [round(float(value), 3) for value in values]


def _teacher(part: Part, models: Models, data: Images, device: torch.device, *, count: int) -> None:
    assert models.teacher is not None
    if not models.comparable:
        part.look("the teacher knows other classes than the data, so its metric cannot be measured")
        return
    if check_teacher(models.teacher, data, device, count=count) < POOR:
        part.broken("nothing can be learnt from predictions like these")


def _batch(settings: Settings, data: Images, device: torch.device) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Return the first batch of a run: the images of one device."""
    devices = max(1, torch.cuda.device_count()) if settings.devices == "auto" else int(settings.devices)
    size = max(1, settings.batch_size // (devices * settings.num_nodes))
    stream = Stream(len(data), batch_size=size, batches=1, seed=settings.seed)
    images, targets = next(iter(training_loader(data, stream, workers=0)))
    moved = [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in each.items()} for each in targets]
    return [image.to(device) for image in images], moved
