"""The teacher's own metric on a few validation images, before a student learns from it."""

from __future__ import annotations

import logging

import torch
from torch import nn

from ..core.teacher import evaluating
from ..report.samples import spread
from .data import CocoImages, Images
from .evaluation import CocoEvaluator, build_evaluator

__all__ = ["check_teacher"]

logger = logging.getLogger("acam_kd")

COUNT = 32
POOR = 1.0
"""The metric, in percent, below which a teacher is suspicious."""


@torch.no_grad()
def check_teacher(teacher: nn.Module, data: Images, device: torch.device, *, count: int = COUNT) -> float:
    """Evaluate the teacher on a few images, and log one line; a poor one is a warning.

    A wrong channel order, other classes or weights of another data set show here and not after a long training.

    Args:
        teacher: it knows the data's classes; moved to the device.
        data: to evaluate on.
        device: where the run's models are.
        count: the number of images, spread over the data.

    Returns:
        AP, mean IoU or top-1 accuracy, in percent.
    """
    indices = spread(len(data), count)
    evaluator = build_evaluator(data)
    if isinstance(evaluator, CocoEvaluator) and isinstance(data, CocoImages):
        evaluator = CocoEvaluator(data, [data.ids[i] for i in indices])
        evaluator.masks = False  # boxes tell enough, and a teacher may have no masks
    teacher.to(device)
    # A compiled teacher would be compiled for single images too, which takes minutes.
    with evaluating(teacher), torch.compiler.set_stance("force_eager"):
        for index in indices:
            image, target = data[index]
            evaluator.add(teacher([image.to(device)]), [target])
    name, value = next(iter(evaluator.metrics().items()))
    text = f"the teacher's {name} on {len(indices)} of {len(data)} validation images: {value:.2f}"
    if value < POOR:
        logger.warning("%s; do its weights, its classes and its pixels' order belong to this data?", text)
    else:
        logger.info("%s", text)
    return value
