"""The length, the learning rate and the periods of a run that does not say them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .run import Settings

__all__ = [
    "ADAMW_RATE", "BATCH", "CHECKPOINT_PERIOD", "COCO_EPOCHS", "COCO_IMAGES", "COCO_STEPS", "EVAL_PERIOD", "MIN_PERIOD",
    "MIN_STEPS", "SGD_RATE", "left_out", "scaled",
]  # fmt: skip

BATCH = 16
COCO_STEPS, COCO_IMAGES = 90000, 118287
COCO_EPOCHS = COCO_STEPS * BATCH / COCO_IMAGES
MIN_STEPS = 3000
SGD_RATE, ADAMW_RATE = 0.01, 0.0002
MIN_PERIOD, CHECKPOINT_PERIOD, EVAL_PERIOD = 100, 1000, 5000


def left_out(epochs: float, batch_size: int, optimizer: str, iterations: int, images: int) -> dict[str, Any]:
    """Return the values of settings that were left out.

    Iterations follow from ``epochs``. Without these, there are as many epochs as ``COCO_STEPS`` steps are on COCO,
    or ``MIN_STEPS`` steps if these are more. Both are steps of ``BATCH`` images. There are four evaluations and ten
    checkpoints, where the limits of their periods allow it.

    Args:
        epochs, iterations: as given; 0 if left out.
        batch_size: images a step.
        optimizer: ``"sgd"`` or ``"adamw"``.
        images: the number of images to train on.

    Example:
        >>> left_out(0.0, 16, "sgd", 0, 118287)["iterations"]
        90000
    """
    seen = epochs * images or max(COCO_EPOCHS * images, MIN_STEPS * BATCH)
    share = batch_size / BATCH
    iterations = iterations or max(1, round(seen / batch_size))
    return {
        "iterations": iterations,
        "learning_rate": SGD_RATE * share if optimizer == "sgd" else ADAMW_RATE * share**0.5,
        "eval_period": max(MIN_PERIOD, min(iterations // 4, EVAL_PERIOD)),
        "checkpoint_period": max(MIN_PERIOD, min(iterations // 10, CHECKPOINT_PERIOD)),
    }


def scaled(settings: Settings, images: int) -> Settings:
    """Return settings with the iterations, the learning rate and the periods that were left out; see ``left_out``.

    Args:
        settings: of a run.
        images: the number of images to train on.
    """
    found = left_out(settings.epochs, settings.batch_size, settings.optimizer, settings.iterations, images)
    given = {name: value for name in found if (value := getattr(settings, name))}
    return dataclasses.replace(settings, epochs=0.0, **{**found, **given})
