"""The teacher's own metric on a few images, before a student learns from it."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, build_detection_test_loader
from torch import nn

from ..core.teacher import evaluating
from ..report.samples import spread
from .config import META_ARCHITECTURE
from .datasets import NUM_CLASSES
from .evaluation import build_evaluator
from .teacher import RANDOM, build_teacher

__all__ = ["check_teacher"]

logger = logging.getLogger("detectron2.acam_kd")

COUNT = 32
POOR = 1.0
"""The metric, in percent, below which a teacher is suspicious."""
METRICS = {"coco": ("bbox", "AP"), "sem_seg": ("sem_seg", "mIoU")}
"""The ``evaluator_type`` of the datasets that a teacher is measured on -> the metric."""


def check_teacher(cfg: CfgNode, *, count: int = COUNT) -> float | None:
    """Evaluate the teacher on a few images of the first test dataset, and log one line; a poor one is a warning.

    Every process of a run calls it. The teacher is built for it, read by its own config, and forgotten. No random
    number is used up.

    Args:
        cfg: the config of the run.
        count: the number of images, spread over the dataset.

    Returns:
        AP of boxes or mean IoU, in percent. None if there is nothing to measure: DISTILL.TEACHER.CHECK is off, there is
        no teacher or a random one, no dataset, or one of other classes.
    """
    node = cfg.DISTILL
    alone = cfg.MODEL.META_ARCHITECTURE != META_ARCHITECTURE
    unused = alone or (not node.METHOD and node.INHERIT == "never")
    if not node.TEACHER.CHECK or unused or node.TEACHER.WEIGHTS == RANDOM or not cfg.DATASETS.TEST:
        return None
    name = cfg.DATASETS.TEST[0]
    metadata = MetadataCatalog.get(name)
    kind = metadata.get("evaluator_type", None)
    if kind not in METRICS:
        return None
    part, metric = METRICS[kind]
    with _same_random_numbers():
        teacher, teacher_cfg = build_teacher(cfg)
        if not _knows_classes(teacher_cfg, metadata):
            return None
        with _quiet():
            dicts = DatasetCatalog.get(name)
        chosen = [dicts[index] for index in spread(len(dicts), count)]
        value = _evaluate(teacher, teacher_cfg, name, chosen, by_image=kind == "coco").get(part, {}).get(metric)
    if value is None:  # another process has it
        return None
    text = f"the teacher's {metric} on {len(chosen)} of {len(dicts)} images of {name}: {value:.2f}"
    if value >= POOR:
        logger.info("%s", text)
    else:
        logger.warning("%s; do its weights, its classes and its INPUT.FORMAT belong to this data?", text)
    return float(value)


def _knows_classes(cfg: CfgNode, metadata: Any) -> bool:
    """Say whether a model predicts as many classes as a dataset has."""
    name = cfg.MODEL.META_ARCHITECTURE
    fields = NUM_CLASSES.get(cfg.DISTILL.STUDENT_META_ARCHITECTURE if name == META_ARCHITECTURE else name, {})
    values: Any = cfg
    for field, key in fields.items():
        values = cfg
        for part in key.split("."):
            values = values[part]
        if values != len(metadata.get(field, [])):
            return False
    return bool(fields)


@torch.no_grad()
def _evaluate(
    teacher: nn.Module, cfg: CfgNode, name: str, chosen: list[dict[str, Any]], *, by_image: bool
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, _quiet(), evaluating(teacher):
        loader = build_detection_test_loader(chosen, mapper=DatasetMapper(cfg, is_train=False), num_workers=0)
        evaluator = build_evaluator(name, folder)
        evaluator.reset()
        for inputs in loader:
            evaluator.process(inputs, teacher(inputs))
        ids = {"img_ids": [entry["image_id"] for entry in chosen]} if by_image else {}
        return dict(evaluator.evaluate(**ids) or {})


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Restore the state of all random numbers: weights draw them, and so do Detectron2's augmentations."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back the words and tables of datasets and evaluators."""
    loggers = [logging.getLogger(f"detectron2.{part}") for part in ("evaluation", "data")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for each, level in zip(loggers, levels):
            each.setLevel(level)
