"""Builds the teacher from a config file of its own, and refuses one whose weights did not load."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch import nn

from ..core import ConfigError
from ..core.errors import first_line
from ..core.weights import fit, not_finite, read_state_dict, unreadable
from ..files import sha256
from .config import META_ARCHITECTURE
from .config_files import merge_loaded, read_config
from .segmentation_config import add_missing_keys, add_segmentation_config
from .weights_file import check_pickle

__all__ = ["build_teacher", "load_teacher", "teacher_config"]

RANDOM = "random"

logger = logging.getLogger("detectron2.acam_kd.teacher")


def teacher_config(cfg: CfgNode) -> CfgNode:
    """Return the teacher's full config: today's defaults, its file, its overrides, its weights.

    Keys that other projects added to ``cfg`` are known to the teacher's config too, with the values they have
    in ``cfg``, so that its file may set them.

    Raises:
        ConfigError: no such config file, an unusable one, or no weights; the message lists what was tried.
    """
    node = cfg.DISTILL.TEACHER
    path, weights = _locate(node.CONFIG_FILE)
    teacher = get_cfg()
    add_segmentation_config(teacher)  # its defaults: the student's values would be wrong where the file is silent
    add_missing_keys(teacher, cfg)
    teacher.defrost()
    teacher.DISTILL.STUDENT_META_ARCHITECTURE = "GeneralizedRCNN"  # the default, should the file not say it
    if "MODEL.WEIGHTS" in node.OPTS:
        raise ConfigError("DISTILL.TEACHER.OPTS", "MODEL.WEIGHTS", "other keys", "set DISTILL.TEACHER.WEIGHTS")
    loaded = read_config(path, argument="teacher")
    try:
        merge_loaded(teacher, loaded, path)
        teacher.merge_from_list(list(node.OPTS))
    except (KeyError, ValueError, AssertionError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise ConfigError(
            "teacher", f"{path}: {first_line(error)}", "a config of Detectron2",
            "DISTILL.TEACHER.OPTS are read after it; keys of another project must be added to the config before",
        ) from error  # fmt: skip
    if teacher.MODEL.META_ARCHITECTURE == META_ARCHITECTURE:  # a student that was distilled itself
        teacher.MODEL.META_ARCHITECTURE = teacher.DISTILL.STUDENT_META_ARCHITECTURE
    teacher.MODEL.DEVICE = cfg.MODEL.DEVICE
    teacher.MODEL.WEIGHTS = node.WEIGHTS or weights
    if not teacher.MODEL.WEIGHTS:
        raise ConfigError(
            "teacher_weights", "nothing", f"a file for {node.CONFIG_FILE}, which is no config of the model zoo",
            f"or '{RANDOM}' for an untrained teacher",
        )  # fmt: skip
    return teacher


def build_teacher(cfg: CfgNode) -> tuple[nn.Module, CfgNode]:
    """Build the teacher's whole detector and load its weights.

    Returns:
        The detector, in eval mode, and its config.

    Raises:
        ConfigError: config file or weights cannot be read, or a tensor is missing in them or has another shape there.
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
        raise ConfigError("teacher", "nothing", "a path or a name in the model zoo")
    if name.endswith(".py"):
        raise ConfigError("teacher", f"{name}, a LazyConfig", "a .yaml; see configs/lazy for LazyConfigs")
    if PathManager.isfile(name):
        return name, ""
    tried = f"no file {os.path.abspath(name)}, and no such name in the model zoo"
    try:
        from detectron2 import model_zoo  # needs pkg_resources, which setuptools >= 81 lacks
    except ImportError as error:
        hint = f"the model zoo cannot be opened: {error} (it needs setuptools < 81)"
        raise ConfigError("teacher", tried, "a path or a name in the model zoo", hint) from error
    try:
        path = model_zoo.get_config_file(name)
    except RuntimeError as error:
        raise ConfigError("teacher", tried, "a path or a name in the model zoo") from error
    try:
        return path, model_zoo.get_checkpoint_url(name)
    except RuntimeError:
        return path, ""


class _StrictCheckpointer(DetectionCheckpointer):
    """Reads all formats that Detectron2 reads and those of core/weights.py, and keeps what did not fit."""

    incompatible: Any = None

    def _torch_load(self, f: str) -> dict[str, Any]:
        found = fit(read_state_dict(f, argument="teacher_weights"), self.model)
        if found.others:
            raise ConfigError("teacher_weights", f"{f} {found.problem()}", "one model")
        return {"model": found.tensors}

    def _load_model(self, checkpoint: Any) -> Any:
        self.incompatible = super()._load_model(checkpoint)
        return self.incompatible


def _load(detector: nn.Module, weights: str) -> None:
    try:
        path = PathManager.get_local_path(weights)
        found = os.path.isfile(path)
    except OSError as error:  # a download that failed
        raise ConfigError("teacher_weights", f"{weights}, which cannot be read: {error}", "a readable file") from error
    if not found:
        raise ConfigError("teacher_weights", f"no file {os.path.abspath(path)}", "an existing one")
    checkpointer = _StrictCheckpointer(detector)
    try:
        check_pickle(path, "teacher_weights")
        checkpointer.load(weights)
    except ConfigError:
        raise
    except Exception as error:  # whatever torch, pickle and Detectron2 make of a file that is no checkpoint
        raise ConfigError("teacher_weights", f"{weights}, {unreadable(error)}", "a checkpoint") from error
    incompatible = checkpointer.incompatible
    wrong = [
        f"{name}: {there} in the file, {here} in the teacher" for name, there, here in incompatible.incorrect_shapes
    ]
    known = {name for name, _, _ in incompatible.incorrect_shapes}
    wrong += [f"{name}: missing in the file" for name in incompatible.missing_keys if name not in known]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        own = os.path.join(os.path.dirname(path), "student_config.yaml")
        hint = f"set {{teacher}} to {own}, the config of that run" if os.path.isfile(own) else ""
        raise ConfigError(
            "teacher_weights",
            f"{weights}, with which {len(wrong)} tensors would stay random ({'; '.join(wrong[:8])}{more})",
            "the weights of this teacher",
            hint or "do they belong to {teacher}?",
        )
    if names := not_finite(detector.state_dict()):
        value = f"{weights} with NaN or infinity in {len(names)} tensors, the first is {names[0]}"
        raise ConfigError("teacher_weights", value, "finite weights")
    logger.info("teacher loaded: all %d tensors from %s (sha256 %s)", len(detector.state_dict()), weights, sha256(path))


def load_teacher(model: str | nn.Module, weights: str = "", *, opts: Sequence[Any] = (), device: str = "") -> nn.Module:
    """Build a teacher and load all of its weights; for ``acam_kd.distill``, in Python or in a LazyConfig.

    Args:
        model: a config file, the name of one in the model zoo, or a model that is built already.
        weights: a checkpoint in any of Detectron2's formats; empty for those of a zoo config, ``"random"`` for none.
        opts: KEY VALUE pairs that override the config.
        device: as MODEL.DEVICE; the config's if left out.

    Returns:
        The teacher, in evaluation mode.

    Raises:
        ConfigError: config or weights cannot be read, or a tensor is missing in the weights or has another shape.
    """
    if isinstance(model, nn.Module):
        if not weights:
            raise ConfigError("teacher_weights", "nothing", f"a file, or '{RANDOM}' for an untrained teacher")
        teacher = model
        if weights != RANDOM:
            _load(teacher, weights)
        return teacher.to(device or "cpu").eval() if device else teacher.eval()
    from .config import add_distillation_config

    cfg = get_cfg()
    add_distillation_config(cfg)
    cfg.DISTILL.TEACHER.CONFIG_FILE, cfg.DISTILL.TEACHER.WEIGHTS = model, weights
    cfg.DISTILL.TEACHER.OPTS = [*opts]
    if not device:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.MODEL.DEVICE = device
    teacher, teacher_cfg = build_teacher(cfg)
    if not getattr(teacher, "input_format", None):
        teacher.input_format = teacher_cfg.INPUT.FORMAT  # type: ignore[assignment]  # a SemanticSegmentor has none
    return teacher
