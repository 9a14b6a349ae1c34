"""Builds the teacher from a config file of its own, and refuses one whose weights did not load."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch import nn

from ..files import sha256
from .config import META_ARCHITECTURE
from .segmentation_config import add_missing_keys, add_segmentation_config

__all__ = ["build_teacher", "teacher_config"]

RANDOM = "random"

logger = logging.getLogger("detectron2.acam_kd.teacher")


def teacher_config(cfg: CfgNode) -> CfgNode:
    """The teacher's full config: today's defaults of Detectron2 and of ours, its file, its overrides, its weights.

    Keys that other projects added to ``cfg`` are known to the teacher's config too, with the values they have
    in ``cfg``, so that its file may set them.

    Raises:
        FileNotFoundError: no such config file; the message lists what was tried.
        ValueError: no weights, or an unusable file.
    """
    node = cfg.DISTILL.TEACHER
    path, weights = _locate(node.CONFIG_FILE)
    teacher = get_cfg()
    add_segmentation_config(teacher)  # its defaults: the student's values would be wrong where the file is silent
    add_missing_keys(teacher, cfg)
    teacher.defrost()
    teacher.DISTILL.STUDENT_META_ARCHITECTURE = "GeneralizedRCNN"  # the default, should the file not say it
    if "MODEL.WEIGHTS" in node.OPTS:
        raise ValueError("MODEL.WEIGHTS in DISTILL.TEACHER.OPTS would not be used; set DISTILL.TEACHER.WEIGHTS")
    try:
        teacher.merge_from_file(path)
        teacher.merge_from_list(list(node.OPTS))
    except (KeyError, ValueError, AssertionError, TypeError, OSError, yaml.YAMLError) as error:
        raise ValueError(
            f"the teacher's config {path} cannot be read: {error} (keys: DISTILL.TEACHER.CONFIG_FILE, "
            "DISTILL.TEACHER.OPTS; keys of another project must be added to the config before)"
        ) from error
    if teacher.MODEL.META_ARCHITECTURE == META_ARCHITECTURE:  # a student that was distilled itself
        teacher.MODEL.META_ARCHITECTURE = teacher.DISTILL.STUDENT_META_ARCHITECTURE
    teacher.MODEL.DEVICE = cfg.MODEL.DEVICE
    teacher.MODEL.WEIGHTS = node.WEIGHTS or weights
    if not teacher.MODEL.WEIGHTS:
        raise ValueError(
            f"the teacher {node.CONFIG_FILE} has no weights: DISTILL.TEACHER.WEIGHTS is empty and its config is not "
            f"one of the model zoo. Set it to a file, or to '{RANDOM}' for an untrained teacher"
        )
    return teacher


def build_teacher(cfg: CfgNode) -> tuple[nn.Module, CfgNode]:
    """Build the teacher's whole detector and load its weights.

    Returns:
        The detector, in eval mode, and its config.

    Raises:
        FileNotFoundError: the config file or the weights cannot be read.
        ValueError: a tensor of the teacher is missing in the weights or has another shape there.
    """
    teacher_cfg = teacher_config(cfg)
    if teacher_cfg.MODEL.WEIGHTS == RANDOM:
        with torch.random.fork_rng(devices=[]):  # the same one in every process
            torch.default_generator.manual_seed(0)
            detector = build_model(teacher_cfg)
        logger.warning("the teacher has RANDOM weights, as DISTILL.TEACHER.WEIGHTS asks: nothing can be learnt from it")
    else:
        detector = build_model(teacher_cfg)
        _load(detector, teacher_cfg.MODEL.WEIGHTS)
    return detector.eval(), teacher_cfg


def _locate(name: str) -> tuple[str, str]:
    """Find a config file; returns its path and, for a zoo config, the address of its weights."""
    if not name:
        raise ValueError("no teacher is named (key: DISTILL.TEACHER.CONFIG_FILE; a path or a model-zoo name)")
    if name.endswith(".py"):
        raise ValueError(
            f"the teacher's config {name} is a LazyConfig; a .yaml is needed (DISTILL.TEACHER.CONFIG_FILE)"
        )
    if PathManager.isfile(name):
        return name, ""
    tried = f"tried {os.path.abspath(name)} and the model zoo (key: DISTILL.TEACHER.CONFIG_FILE)"
    try:
        from detectron2 import model_zoo  # needs pkg_resources, which setuptools >= 81 lacks
    except ImportError as error:
        raise FileNotFoundError(
            f"no teacher config {name}: {tried}; the zoo itself cannot be opened: {error} (needs setuptools < 81)"
        ) from error
    try:
        path = model_zoo.get_config_file(name)
    except RuntimeError as error:
        raise FileNotFoundError(f"no teacher config {name}: {tried}") from error
    try:
        return path, model_zoo.get_checkpoint_url(name)
    except RuntimeError:
        return path, ""


class _StrictCheckpointer(DetectionCheckpointer):
    """Reads all formats that Detectron2 reads, and keeps what did not fit instead of only logging it."""

    incompatible: Any = None

    def _load_model(self, checkpoint: Any) -> Any:
        self.incompatible = super()._load_model(checkpoint)
        return self.incompatible


def _load(detector: nn.Module, weights: str) -> None:
    key = "(key: DISTILL.TEACHER.WEIGHTS)"
    try:
        path = PathManager.get_local_path(weights)
        found = os.path.isfile(path)
    except OSError as error:  # a download that failed
        raise FileNotFoundError(f"the teacher's weights {weights} cannot be read: {error} {key}") from error
    if not found:
        raise FileNotFoundError(f"the teacher's weights do not exist: tried {os.path.abspath(path)} {key}")
    checkpointer = _StrictCheckpointer(detector)
    try:
        checkpointer.load(weights)
    except Exception as error:  # whatever torch, pickle and Detectron2 make of a file that is no checkpoint
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the teacher's weights {weights} cannot be loaded: {reason} {key}") from error
    incompatible = checkpointer.incompatible
    wrong = [
        f"{name}: {there} in the file, {here} in the teacher" for name, there, here in incompatible.incorrect_shapes
    ]
    known = {name for name, _, _ in incompatible.incorrect_shapes}
    wrong += [f"{name}: missing in the file" for name in incompatible.missing_keys if name not in known]
    if wrong:
        raise ValueError(
            f"the teacher's weights {weights} do not fit its config, {len(wrong)} tensors would stay random {key}:\n  "
            + "\n  ".join(wrong)
        )
    logger.info("teacher loaded: all %d tensors from %s (sha256 %s)", len(detector.state_dict()), weights, sha256(path))
