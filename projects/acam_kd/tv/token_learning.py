"""Tokens of MasKD and FreeKD in a run of ``acam-kd train``: learnt by the run itself where they have no file yet."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor

from ..core import ConfigError
from ..files import sha256
from ..methods.parts.token_runs import TokenFile, ensure_tokens, learn_to_file
from .adapter import adapt
from .build import load_teacher
from .card import read_card
from .data import Stream, training_loader
from .distillation import parse_options
from .labels import load_data
from .run import Settings

__all__ = ["ensure", "learn"]

logger = logging.getLogger("acam_kd")


def ensure(settings: Settings, folder: str | Path) -> Settings:
    """Return the settings of a run with a file of tokens for each method that needs one; learn those that do not exist.

    The first process learns, alone and on its device, with all ``batch_size`` images of a step. The others wait for
    the file, not in a collective call.

    Args:
        settings: ``resolved``.
        folder: of the run.

    Raises:
        ConfigError: see ``ensure_tokens`` and ``learn``.
        RunError: see ``ensure_tokens``.
    """
    if not settings.teacher:
        return settings
    files = ensure_tokens(
        parse_options(settings.method, settings.options),
        folder,
        partial(learn, settings),
        teacher=partial(_identity, settings),
        first=getattr(rank_zero_only, "rank", 0) == 0,
        log=logger,
    )
    return replace(settings, options=(*settings.options, *(f"{name}.tokens={path}" for name, path in files.items())))


def learn(settings: Settings, wanted: TokenFile) -> list[dict[str, float]]:
    """Learn tokens on the teacher of a run, and write their file.

    The images are those of the run, cropped as for the student. The teacher resizes and normalises them itself.

    Args:
        settings: of the run, ``resolved``.
        wanted: the file.

    Returns:
        The losses of every logged step.

    Raises:
        ConfigError: the teacher was not trained on the classes of the data; or see ``load_teacher``.
        RunError: see ``learn_to_file``.
    """
    card = read_card(settings.teacher, argument="teacher")[0] if _is_run(settings) else None
    data = load_data(
        settings.train_split, card.name if card else settings.teacher, name="training data", crop=settings.crop
    )
    teacher, _ = load_teacher(settings, data)
    hint = "its own losses teach the tokens; set {tokens} to a file learnt on its data"
    if card and card.categories != data.categories:
        raise ConfigError(
            "teacher",
            f"{settings.teacher} with the categories {card.categories}",
            f"the data's {data.categories}",
            hint,
        )
    if not card and settings.teacher_classes not in (0, data.num_classes):
        raise ConfigError("teacher_classes", settings.teacher_classes, f"the data's {data.num_classes}", hint)
    assert teacher is not None
    adapter = adapt(teacher)
    assert adapter is not None
    device = torch.device("cuda" if torch.cuda.is_available() and settings.accelerator != "cpu" else "cpu")
    teacher.to(device)
    stream = Stream(len(data), batch_size=settings.batch_size, batches=wanted.iterations, seed=0)
    loader = training_loader(data, stream, workers=settings.workers)
    return learn_to_file(adapter, _batches(loader, device), wanted, settings.taps)


def _is_run(settings: Settings) -> bool:
    return Path(settings.teacher).is_dir()


def _identity(settings: Settings) -> str:
    """Return the hash of the teacher's weights, or the name of torchvision's; nothing for neither, a fault."""
    weights = settings.teacher_weights
    if not weights and _is_run(settings):
        weights = str(read_card(settings.teacher, argument="teacher")[1])
    if Path(weights).is_file():
        return sha256(weights)
    return f"{settings.teacher} {weights}" if weights.isidentifier() else ""


def _batches(loader: Any, device: torch.device) -> Iterator[tuple[list[Tensor], list[dict[str, Any]]]]:
    """Give images and targets on the teacher's device."""
    for images, targets in loader:
        yield (
            [image.to(device) for image in images],
            [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in target.items()} for target in targets],
        )
