"""One training run with torchvision models: data, models, devices, and then the loop."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
from lightning.fabric import Fabric

from ..core import ConfigError
from ..core.interrupts import Signals
from ..core.lost import lost_processes
from ..data.fingerprint import Fingerprint
from . import token_learning
from .build import build_models
from .card import resolved
from .checkpoint import read_checkpoint
from .class_images import reduce_classes
from .data import Images, Stream
from .defaults import scaled
from .devices import build_fabric, is_first, launch
from .folder import RunFolder
from .hard import check_augmentor
from .labels import load_data
from .loggers import check_loggers
from .loop import Moment, Training
from .mixing import build_mixing
from .models import plain
from .names import option
from .preparation import prepare
from .pseudo_labels import build_unlabelled, check_models
from .reports import Reports
from .run import Settings
from .teacher_check import check_teacher
from .unlabelled import check_unlabelled, load_unlabelled

__all__ = ["train"]

logger = logging.getLogger("acam_kd")


def train(settings: Settings, output: str | Path, *, resume: bool = False, observers: Sequence[Moment] = ()) -> Any:
    """Train, evaluate, and leave the student in ``output``.

    Args:
        settings: of the run.
        output: folder; ``folder.RunFolder`` lists what will be there.
        resume: resume what is in ``output``, from its last checkpoint; a finished run is left alone.
        observers: see ``Training``.

    Returns:
        The content of ``result.json``; None in all processes but the first.

    Raises:
        ConfigError: something in settings, data or weights does not fit, or another run is at work in the folder.
        RunError: a loss or gradient is not finite, or a file cannot be read or written.
        Interrupted: Ctrl-C or SIGTERM; what it says holds.
    """
    check_loggers(settings.logger)
    fabric = build_fabric(settings)
    folder = RunFolder(output, first=is_first(fabric))
    with folder.locked(), Signals() as signals:
        settings = folder.check(settings, resume=resume)
        if resume and (result := folder.result()) is not None:
            logger.info("%s is complete already", folder.path)
            return result
        return _train(fabric, settings, folder, signals, resume=resume, observers=observers)


def _train(
    fabric: Fabric,
    asked: Settings,
    folder: RunFolder,
    signals: Signals,
    *,
    resume: bool,
    observers: Sequence[Moment],
) -> Any:
    training, validation = _load(resolved(asked))
    asked = folder.check(_scaled(asked, len(training)), resume=resume)
    settings = resolved(asked)
    check_unlabelled(settings, world=fabric.world_size)
    images = load_unlabelled(settings, validation)
    stream = Stream(
        len(training),
        batch_size=settings.batch_size,
        batches=settings.iterations,
        seed=settings.seed,
        world=fabric.world_size,
    )
    settings = token_learning.ensure(settings, folder.path)
    lightning.seed_everything(settings.seed, verbose=False)
    models = build_models(settings, training, world=fabric.world_size)
    check_models(settings, models)
    check_augmentor(settings, models.student, models.teacher, comparable=models.comparable)
    mixing = build_mixing(settings, models.student, training.num_classes)
    state = read_checkpoint(folder.checkpoint) if resume and folder.checkpoint.is_file() else None
    named = {"train_split": training, "val_split": validation} | ({} if images is None else {"unlabelled": images})
    folder.start(asked, {name: Fingerprint.of(*data.files(), data.categories) for name, data in named.items()})
    launch(fabric)
    unlabelled = None if images is None else build_unlabelled(fabric, settings, models, images, training, folder)
    with Reports(folder, settings) as reports:
        run = Training(
            fabric,
            models.student,
            settings,
            training=training,
            validation=validation,
            stream=stream,
            folder=folder,
            signals=signals,
            reports=reports,
            observers=observers,
            unlabelled=unlabelled,
            mixing=mixing,
        )
        if state is None:
            prepare(models.student, training, settings, fabric.device)
        if state is None and models.teacher and models.comparable and not settings.no_teacher_check and folder.first:
            check_teacher(models.teacher, validation, fabric.device)
        with lost_processes(), run.saving_what_is_done():
            run.run(state)
            return folder.finish(plain(models.student), asked, metrics=run.metrics, seconds=run.time)


def _scaled(asked: Settings, images: int) -> Settings:
    """Return the settings without gaps, and print what was filled in."""
    settings = scaled(asked, images)
    if settings != asked:
        epochs = settings.iterations * settings.batch_size / images
        often = f"every {settings.eval_period} steps and " if settings.eval_period < settings.iterations else ""
        logger.info(
            "%d iterations of %d images: %.1f epochs of %d; learning rate %.3g; evaluated %sat the end",
            *(settings.iterations, settings.batch_size, epochs, images, settings.learning_rate, often),
        )
    return settings


def _load(settings: Settings) -> tuple[Images, Images]:
    if settings.crop and settings.size:
        raise ConfigError(
            "crop",
            settings.crop,
            f"none beside a size of {settings.size}, to which it would be resized",
            "choose one of {crop} and {size}",
        )
    name, loaded, errors = settings.student_name, list[Images](), list[ConfigError]()
    for title, split, crop in (
        ("training data", settings.train_split, settings.crop),
        ("validation data", settings.val_split, None),
    ):
        try:
            size, augment = settings.size, settings.augment
            loaded.append(load_data(split, name, name=title, crop=crop, size=size, augment=augment))
        except ConfigError as error:
            errors.append(error)
    if len(errors) == 2 and errors[0].argument == errors[1].argument == "dataset":
        logger.error("%s", errors[1].render(option))
        hint = f"{errors[0].hint}; the validation data has troubles too: see above".removeprefix("; ")
        raise ConfigError("dataset", errors[0].value, errors[0].allowed, hint)
    if errors:
        raise errors[0]
    training, validation = loaded
    reduce_classes(training, settings.fraction, settings.leave_out, settings.seed)
    if training.categories != validation.categories:
        raise ConfigError(
            "val_split", f"the categories {validation.categories}", f"those of the training data, {training.categories}"
        )
    return training, validation
