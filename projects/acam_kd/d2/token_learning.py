"""Tokens learnt on a Detectron2 teacher: the first stage of MasKD and FreeKD, from the config of the second."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import nn

from ..core import LOGITS, choose_taps
from ..core.features import Pyramid
from ..core.methods import levels_read
from ..methods.parts.token_files import build_tokens, save_tokens
from ..methods.parts.token_learning import TokenLearning, learn_tokens
from .adapter import D2Adapter, logits_module
from .datasets import check_datasets
from .sem_seg_data import build_sem_seg_mapper
from .teacher import build_teacher

__all__ = ["learn"]

logger = logging.getLogger("detectron2.acam_kd.tokens")


def learn(
    cfg: CfgNode, method: str, output: str, *, iterations: int = 2000, learning_rate: float = 0.01
) -> list[dict[str, float]]:
    """Learn tokens on the teacher of a distillation and write them to a file, for ``DISTILL.<METHOD>.TOKENS``.

    The images are those of ``DATASETS.TRAIN``, read and augmented as for the student but with the teacher's order of
    channels, ``SOLVER.IMS_PER_BATCH`` at a time. The teacher runs as a whole and normalises them itself.

    Args:
        cfg: of the distillation; its datasets are registered.
        method: ``MasKD`` or ``FreeKD``.
        output: the file.
        iterations: steps.
        learning_rate: of Adam.

    Returns:
        What ``learn_tokens`` logged.

    Raises:
        ConfigError: see ``build_teacher`` and ``check_datasets``; or the method has no tokens, or no levels that it can
            use.
        RunError: a loss is not finite.
    """
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED)
    teacher, teacher_cfg = build_teacher(cfg)
    data = _data_config(cfg, teacher_cfg)
    check_datasets(data, training=True)
    levels = _levels(cfg, method, teacher)
    tokens = build_tokens(method, levels, _number(cfg, method))
    learning = TokenLearning(teacher, tokens, logits=logits_module(teacher) if LOGITS in levels else None)
    learning.to(cfg.MODEL.DEVICE)
    dense = data.MODEL.META_ARCHITECTURE == "SemanticSegmentor"
    loader = build_detection_train_loader(data, mapper=build_sem_seg_mapper(data) if dense else None)
    with EventStorage(0) as storage:  # Detectron2's heads write into it
        batches = _batches(loader, storage)
        logged = learn_tokens(learning, batches, iterations=iterations, learning_rate=learning_rate)
    save_tokens(output, method, tokens, levels)
    logger.info("tokens of %s for %s: %s", cfg.DISTILL.TEACHER.CONFIG_FILE, ", ".join(tokens), output)
    return logged


def _number(cfg: CfgNode, method: str) -> int:
    """Return what the distillation will ask for; ``build_tokens`` says what is wrong with the method."""
    return int(cfg.DISTILL.get(method.upper(), {}).get("NUM_TOKENS", 0))


def _levels(cfg: CfgNode, method: str, teacher: nn.Module) -> Pyramid:
    """Return the teacher's levels that the method's distillation can use, with the taps that it will have."""
    adapter = D2Adapter(teacher)
    taps = tuple(cfg.DISTILL.TAPS) or choose_taps(method, adapter.offered, adapter.name)
    return levels_read(method, adapter.levels(taps))


def _data_config(cfg: CfgNode, teacher_cfg: CfgNode) -> CfgNode:
    """Return the student's data for the teacher's head: what is read depends on whether that has masks, for one."""
    data = teacher_cfg.clone()
    data.defrost()
    data.DATASETS, data.INPUT, data.DATALOADER = cfg.DATASETS.clone(), cfg.INPUT.clone(), cfg.DATALOADER.clone()
    data.DATASETS.TEST, data.SEED = (), cfg.SEED
    data.INPUT.FORMAT, data.INPUT.MASK_FORMAT = teacher_cfg.INPUT.FORMAT, teacher_cfg.INPUT.MASK_FORMAT
    data.SOLVER.IMS_PER_BATCH = cfg.SOLVER.IMS_PER_BATCH
    return data


def _batches(loader: Any, storage: EventStorage) -> Iterator[tuple[list[dict[str, Any]]]]:
    for batch in loader:
        yield (batch,)
        storage.step()
