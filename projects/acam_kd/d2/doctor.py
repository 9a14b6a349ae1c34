"""A look at the set-up of a Detectron2 run before it starts."""

from __future__ import annotations

import logging
from typing import Any

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils.events import EventStorage
from torch import nn

from ..report.health import Examination, Part, version_findings
from ..report.one_step import look_at_step
from .names import key
from .teacher_check import POOR, check_teacher

__all__ = ["doctor"]

TEACHER_IMAGES = 10


def doctor(cfg: CfgNode, trainer: Any) -> Examination:
    """Look at a set-up: versions, device, data, models, the teacher's metric, and one step.

    Args:
        cfg: checked, with its datasets registered.
        trainer: the class that builds the model and the loader.
    """
    looked = Examination(key)
    loggers = [logging.getLogger(name) for name in ("detectron2.acam_kd", "acam_kd")]
    with looked.part("versions") as part:
        version_findings(part)
        part.ok(f"Detectron2 {detectron2.__version__}")
    with looked.part("device") as part:
        if cfg.MODEL.DEVICE == "cpu" or not torch.cuda.is_available():
            part.look(f"MODEL.DEVICE {cfg.MODEL.DEVICE}: a long run on a CPU takes days")
        else:
            part.ok(torch.cuda.get_device_name())
    with looked.part("data") as part:
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
            part.ok(f"{name}: {len(DatasetCatalog.get(name))} images")
    model: nn.Module | None = None
    with looked.part("models") as part, looked.logged(part, loggers[0]), looked.logged(part, loggers[1]):
        model = trainer.build_model(cfg)
        part.ok(f"student: {cfg.INPUT.FORMAT}, mean {cfg.MODEL.PIXEL_MEAN}, deviation {cfg.MODEL.PIXEL_STD}")
    if model is None:
        return looked
    with looked.part("teacher") as part, looked.logged(part, loggers[0]):
        _look_at_teacher(part, cfg)
    with looked.part("one step") as part, looked.logged(part, loggers[0]), EventStorage():
        batch = next(iter(trainer.build_train_loader(cfg)))
        look_at_step(part, model.train(), batch, names=key)
    return looked


def _look_at_teacher(part: Part, cfg: CfgNode) -> None:
    value = check_teacher(cfg, count=TEACHER_IMAGES)
    if value is None:
        part.look("nothing to measure: no teacher, random weights, other classes, or DISTILL.TEACHER.CHECK off")
    elif value < POOR:
        part.broken("nothing can be learnt from predictions like these")
