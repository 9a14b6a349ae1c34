"""A pass over the training images before the first step, for methods that need one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..core import Distillation
from ..core.teacher import evaluating
from ..methods import MCMI
from .batches import evaluation_loader
from .classification import Classifier
from .data import Images
from .run import Settings

__all__ = ["prepare"]

logger = logging.getLogger("acam_kd")


def prepare(student: nn.Module, data: Images, settings: Settings, device: torch.device) -> None:
    """Take the centroids of MCMI on the training images, which are not augmented; every process does so.

    Args:
        student: on its device, perhaps with a distillation.
        data: to train on.
        settings: of the run.
        device: of the student.
    """
    attached = getattr(student, "distillation", None)
    if not isinstance(attached, Distillation) or not isinstance(student, Classifier):
        return
    for method in attached.method.parts():
        if isinstance(method, MCMI):
            with evaluating(student) if method.mode == "eval" else nullcontext():
                absent = method.take_centroids(_predictions(student, data, settings, device))
            if absent:
                names = ", ".join(data.categories[label] for label in absent)
                logger.warning("MCMI: no training image of %s, whose centroid is uniform", names)
            logger.info("MCMI: centroids of %d images, in %s mode", len(data), method.mode)


@torch.no_grad()
def _predictions(
    student: Classifier, data: Images, settings: Settings, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    for images, targets in evaluation_loader(data, batch_size=settings.batch_size, workers=settings.workers):
        output = student.network(student.batch([image.to(device) for image in images]))
        yield output if isinstance(output, Tensor) else output[0], student.labels(targets)
