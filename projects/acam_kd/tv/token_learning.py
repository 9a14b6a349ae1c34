"""Tokens learnt on a torchvision teacher: the first stage of MasKD and FreeKD, a plain loop without Lightning."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import LOGITS, ConfigError, choose_taps
from ..core.features import Pyramid
from ..core.methods import levels_read
from ..data.splits import Split
from ..methods.parts.token_files import build_tokens, save_tokens
from ..methods.parts.token_learning import TokenLearning, learn_tokens
from .adapter import adapt, logits_module
from .build import load_model
from .data import Stream, training_loader
from .labels import load_data
from .run import read_card

__all__ = ["TokenSettings", "learn"]

logger = logging.getLogger("acam_kd")


@dataclass(frozen=True)
class TokenSettings:
    """Everything that decides what is learnt.

    Args:
        train_split: the data that the teacher was trained on.
        teacher: the folder of a finished run.
        method: ``MasKD`` or ``FreeKD``.
        taps: as in the distillation; empty for logits in segmentation where the method reads them, else the backbone.
        num_tokens: per level; 0 for the paper's.
        iterations, batch_size, learning_rate: of the loop.
        seed: decides the tokens' start, the order of the images and their augmentation.
        workers: processes that read images.
    """

    train_split: Split
    teacher: str
    method: str = "MasKD"
    taps: tuple[str, ...] = ()
    num_tokens: int = 0
    iterations: int = 2000
    batch_size: int = 16
    learning_rate: float = 0.01
    seed: int = 0
    workers: int = 2


def learn(settings: TokenSettings, output: str | Path) -> list[dict[str, float]]:
    """Learn tokens and write them to a file, for the method's ``tokens``.

    Returns:
        What ``learn_tokens`` logged.

    Raises:
        ConfigError: there is no finished run, it knows other classes than the data has, or the method has no tokens.
        RunError: a loss is not finite.
    """
    torch.manual_seed(settings.seed)
    card = read_card(settings.teacher, argument="teacher")[0]
    data = load_data(settings.train_split, card.name, name="training data")
    if card.categories != data.categories:
        raise ConfigError(
            "teacher", f"{settings.teacher} with the categories {card.categories}", f"the data's {data.categories}"
        )
    teacher, _ = load_model(settings.teacher, "", num_classes=None, size=None, role="teacher")
    levels = _levels(settings, teacher)
    tokens = build_tokens(settings.method, levels, settings.num_tokens)
    learning = TokenLearning(teacher, tokens, logits=logits_module(teacher) if LOGITS in levels else None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    learning.to(device)
    stream = Stream(len(data), batch_size=settings.batch_size, batches=settings.iterations, seed=settings.seed)
    logged = learn_tokens(
        learning,
        _batches(training_loader(data, stream, workers=settings.workers), device),
        iterations=settings.iterations,
        learning_rate=settings.learning_rate,
    )
    save_tokens(str(output), settings.method, tokens, levels)
    logger.info("tokens of %s for %s: %s", settings.teacher, ", ".join(tokens), output)
    return logged


def _levels(settings: TokenSettings, teacher: nn.Module) -> Pyramid:
    """Return the teacher's levels that the method's distillation can use, with the taps that it will have."""
    adapter = adapt(teacher)
    assert adapter is not None
    taps = settings.taps or choose_taps(settings.method, adapter.offered, adapter.name)
    if missing := [tap for tap in taps if tap not in adapter.offered]:
        allowed = f"{' or '.join(adapter.offered)} of the teacher, a {adapter.name}"
        raise ConfigError("taps", " and ".join(missing), allowed)
    return levels_read(settings.method, adapter.levels(taps))


def _batches(loader: Any, device: torch.device) -> Iterator[tuple[list[Tensor], list[dict[str, Any]]]]:
    """Images and targets on the teacher's device."""
    for images, targets in loader:
        yield (
            [image.to(device) for image in images],
            [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in target.items()} for target in targets],
        )
