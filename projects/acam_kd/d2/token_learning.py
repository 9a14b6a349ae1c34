"""Tokens of MasKD and FreeKD in a run with Detectron2: learnt by the run itself where they have no file yet."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader, get_detection_dataset_dicts
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from detectron2.utils.file_io import PathManager

from ..files import sha256
from ..methods.parts.token_runs import TokenFile, ensure_tokens, learn_to_file
from .adapter import D2Adapter
from .config import META_ARCHITECTURE
from .datasets import check_datasets
from .meta_arch import read_plan
from .sem_seg_data import build_sem_seg_mapper
from .teacher import RANDOM, build_teacher, teacher_config

__all__ = ["learn", "with_tokens"]

logger = logging.getLogger("detectron2.acam_kd.tokens")


def with_tokens(cfg: CfgNode) -> CfgNode:
    """Return the config of a run with a file of tokens for each method that needs one; learn those that do not exist.

    The first process learns, alone and on its device, with all SOLVER.IMS_PER_BATCH images of a step. The others wait
    for the file, not in a collective call.

    Args:
        cfg: of the distillation; its datasets are registered.

    Raises:
        ConfigError: see ``ensure_tokens``, ``build_teacher`` and ``check_datasets``.
        RunError: see ``ensure_tokens``.
    """
    if cfg.MODEL.META_ARCHITECTURE != META_ARCHITECTURE:
        return cfg
    methods = read_plan(cfg).methods
    assert isinstance(methods, Mapping)
    files = ensure_tokens(
        methods,
        cfg.OUTPUT_DIR,
        partial(learn, cfg),
        teacher=partial(_identity, cfg),
        first=comm.is_main_process(),
        log=logger,
    )
    cfg = cfg.clone()
    cfg.defrost()
    for method, path in files.items():
        cfg.DISTILL[method.upper()].TOKENS = path
    cfg.freeze()
    return cfg


def learn(cfg: CfgNode, wanted: TokenFile) -> list[dict[str, float]]:
    """Learn tokens on the teacher of a distillation, and write their file.

    The images are those of DATASETS.TRAIN, read and augmented as for the student but with the teacher's order of
    channels. The teacher runs as a whole and normalises them itself.

    Args:
        cfg: of the distillation; its datasets are registered.
        wanted: the file.

    Returns:
        The losses of every logged step.

    Raises:
        ConfigError: see ``build_teacher``, ``check_datasets`` and ``learn_to_file``.
        RunError: see ``learn_to_file``.
    """
    teacher, teacher_cfg = build_teacher(cfg)
    data = _data_config(cfg, teacher_cfg)
    check_datasets(data, training=True)
    with EventStorage(0) as storage:  # Detectron2's heads write into it
        return learn_to_file(D2Adapter(teacher), _batches(data, storage), wanted, cfg.DISTILL.TAPS)


def _identity(cfg: CfgNode) -> str:
    """Return the hash of the teacher's weights; nothing if they cannot be read, which ``build_teacher`` reports."""
    weights = teacher_config(cfg).MODEL.WEIGHTS
    try:
        return RANDOM if weights == RANDOM else sha256(PathManager.get_local_path(weights))
    except OSError:
        return ""


def _data_config(cfg: CfgNode, teacher_cfg: CfgNode) -> CfgNode:
    """Return the student's data for the teacher's head: what is read depends on whether that has masks, for one."""
    data, own = teacher_cfg.clone(), cfg.clone()
    data.defrost()
    own.defrost()
    data.DATASETS, data.INPUT, data.DATALOADER = own.DATASETS, own.INPUT, own.DATALOADER
    data.DATASETS.TEST = ()
    data.INPUT.FORMAT, data.INPUT.MASK_FORMAT = teacher_cfg.INPUT.FORMAT, teacher_cfg.INPUT.MASK_FORMAT
    data.SOLVER.IMS_PER_BATCH = cfg.SOLVER.IMS_PER_BATCH
    return data


class _Alone(TrainingSampler):
    """The order of the images for one process, whatever others there are; it asks none of them for a seed."""

    def __init__(self, size: int) -> None:
        super().__init__(size, seed=0)
        self._rank, self._world_size = 0, 1


def _batches(data: CfgNode, storage: EventStorage) -> Iterator[tuple[list[dict[str, Any]]]]:
    dense = data.MODEL.META_ARCHITECTURE == "SemanticSegmentor"
    keypoints = data.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if data.MODEL.KEYPOINT_ON else 0
    images = get_detection_dataset_dicts(
        data.DATASETS.TRAIN, filter_empty=data.DATALOADER.FILTER_EMPTY_ANNOTATIONS, min_keypoints=keypoints
    )
    loader = build_detection_train_loader(
        data,
        dataset=images,
        mapper=build_sem_seg_mapper(data) if dense else None,
        sampler=_Alone(len(images)),
        total_batch_size=data.SOLVER.IMS_PER_BATCH * comm.get_world_size(),  # it is divided by the processes
    )
    for batch in loader:
        yield (batch,)
        storage.step()
