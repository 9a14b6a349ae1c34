"""The config keys of distillation, and the two ways between a distillation's config and its student's."""

from __future__ import annotations

import inspect
import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from ..core import DISTILLER_REGISTRY

__all__ = ["META_ARCHITECTURE", "add_distillation_config", "merge_config_file", "method_arguments", "student_config"]

META_ARCHITECTURE = "DistillationMetaArch"
INHERIT = ("auto", "always", "never")


class _TeacherPaths(CfgNode):
    """Reads config files with the teacher's path made absolute by the very file that names it."""

    @classmethod
    def load_yaml_with_base(cls, filename: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a file; each of its ``_BASE_`` files comes through here on its own."""
        loaded: dict[str, Any] = super().load_yaml_with_base(filename, *args, **kwargs)
        teacher = (loaded.get("DISTILL") or {}).get("TEACHER") or {}
        path = os.path.join(os.path.dirname(os.path.abspath(filename)), teacher.get("CONFIG_FILE") or "")
        if os.path.isfile(path):
            teacher["CONFIG_FILE"] = os.path.normpath(path)
        return loaded


def merge_config_file(cfg: CfgNode, path: str) -> None:
    """``cfg.merge_from_file(path)``, with the teacher's config file relative to the file that names it.

    Detectron2 resolves ``_BASE_`` in this way, but after a plain ``merge_from_file`` nobody knows which file a
    value came from, and a relative teacher is then looked for in the working directory.

    Raises:
        FileNotFoundError: no such file.
    """
    if not PathManager.isfile(path):
        raise FileNotFoundError(f"no config file {os.path.abspath(path)} (option: --config-file)")
    cfg.merge_from_file(path)
    loaded = _TeacherPaths.load_yaml_with_base(path, allow_unsafe=True)
    teacher = (loaded.get("DISTILL") or {}).get("TEACHER") or {}
    cfg.DISTILL.TEACHER.CONFIG_FILE = teacher.get("CONFIG_FILE", cfg.DISTILL.TEACHER.CONFIG_FILE)


def add_distillation_config(cfg: CfgNode) -> None:
    """Add the keys of distillation, with their defaults, to a Detectron2 config.

    Every registered method has a node ``DISTILL.<NAME>`` whose keys and defaults are the arguments of its
    constructor, so a method of your own has one too if it is registered before this is called.
    """
    cfg.DISTILL = CfgNode()
    # What the student is; MODEL.META_ARCHITECTURE is "DistillationMetaArch".
    cfg.DISTILL.STUDENT_META_ARCHITECTURE = "GeneralizedRCNN"
    # A name in DISTILLER_REGISTRY, or "" for no distillation (the student alone, or inheritance alone).
    cfg.DISTILL.METHOD = "ACAMKD"
    # The student's levels to distil; empty for all whose stride the teacher has too.
    cfg.DISTILL.LEVELS = []
    # Whether the student's neck and head start from the teacher's: "auto" if both are of one type.
    cfg.DISTILL.INHERIT = "auto"
    # Iterations between two lines of diagnostics, in the log and in the event storage.
    cfg.DISTILL.LOG_PERIOD = 20
    # Largest norm of all gradients together, 0 for any. SOLVER.CLIP_GRADIENTS clips each parameter alone.
    cfg.DISTILL.MAX_GRADIENT_NORM = 0.0

    cfg.DISTILL.TEACHER = CfgNode()
    # A Detectron2 config file: a path, or a name in the model zoo such as
    # "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml".
    cfg.DISTILL.TEACHER.CONFIG_FILE = ""
    # Its weights. Empty: those of the zoo for a zoo config. "random": none, for trying things out.
    cfg.DISTILL.TEACHER.WEIGHTS = ""
    # KEY VALUE pairs that override the teacher's config file.
    cfg.DISTILL.TEACHER.OPTS = []

    for name, method in DISTILLER_REGISTRY:
        node = CfgNode({key.upper(): value for key, value in method_arguments(method).items()})
        cfg.DISTILL[name.upper()] = node

    # COCO-format datasets to register: [name, json file, image folder], each.
    cfg.DATASETS.COCO_FORMAT = []


def method_arguments(method: type) -> dict[str, Any]:
    """The hyper-parameters of a method, argument -> default: its constructor's keyword-only arguments."""
    parameters = inspect.signature(method).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def student_config(cfg: CfgNode) -> CfgNode:
    """The config of the student alone, which stock Detectron2 loads: no key of ours is left in it."""
    student = cfg.clone()
    student.defrost()
    if student.MODEL.META_ARCHITECTURE == META_ARCHITECTURE:
        student.MODEL.META_ARCHITECTURE = cfg.DISTILL.STUDENT_META_ARCHITECTURE
    del student["DISTILL"]
    del student.DATASETS["COCO_FORMAT"]
    return student
