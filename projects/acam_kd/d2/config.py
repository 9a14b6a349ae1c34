"""The config keys of distillation, and the two ways between a distillation's config and its student's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.utils.file_io import PathManager

from ..core import DISTILLER_REGISTRY, ConfigError
from ..core.options import all_arguments
from .config_files import ARGUMENT, merge_loaded, read_config
from .former_keys import LINES, forget_former_keys, read_former_keys, replace_former_keys
from .segmentation_config import add_segmentation_config

__all__ = [
    "META_ARCHITECTURE",
    "add_distillation_config",
    "check_student",
    "exported_student_config",
    "merge",
    "student_config",
]

META_ARCHITECTURE = "DistillationMetaArch"


def _gone(path: str) -> str:
    """Return the hint for a config of 0.1 that is gone."""
    folder = os.path.basename(os.path.dirname(os.path.abspath(path)))
    if folder == "methods":
        stem = os.path.basename(path).partition("_")[0]
        known = [name for name, _ in DISTILLER_REGISTRY if name.lower() == stem]
        recipe = "the weights for each detector are recipes now; see docs/migration.md"
        return f"set DISTILL.METHOD to {known[0]}: {recipe}" if known else ""
    if folder == "ablations":
        return "it is a row of configs/compare/ablations_coco.yaml now; see docs/migration.md"
    return ""


def merge_from_file(self: CfgNode, cfg_filename: str, allow_unsafe: bool = True) -> None:
    """Merge a file as Detectron2 does, with the teacher's config file relative to the file that names it.

    Detectron2 resolves ``_BASE_`` in this way, but after a merge nobody knows which file a value came from. No code in
    a file is run, whatever ``allow_unsafe`` says: see ``config_files``.

    Raises:
        ConfigError: there is no such file; or it, or a file that it is based on, cannot be read.
    """
    if not PathManager.isfile(cfg_filename):
        raise ConfigError(ARGUMENT, f"no file {os.path.abspath(cfg_filename)}", "an existing one", _gone(cfg_filename))

    def each(content: dict[str, Any], path: str) -> None:
        replace_former_keys(content, self.__dict__[LINES])
        _find_teacher(content, path)

    try:
        loaded = read_config(cfg_filename, each=each)
    except ConfigError as error:  # perhaps a file that it is based on has another name now
        base = getattr(error.__cause__, "filename", None)
        if hint := _gone(str(base)) if base else "":
            raise ConfigError(error.argument, error.value, error.allowed, hint) from error
        raise
    merge_loaded(self, loaded, cfg_filename)


def _find_teacher(content: dict[str, Any], path: str) -> None:
    """Make the teacher's path absolute by the very file that names it."""
    distill = content.get("DISTILL")
    teacher = distill.get("TEACHER") if isinstance(distill, dict) else None
    named = teacher.get("CONFIG_FILE") if isinstance(teacher, dict) else None
    if isinstance(named, str) and isinstance(teacher, dict):
        absolute = os.path.join(os.path.dirname(os.path.abspath(path)), named)
        if os.path.isfile(absolute):
            teacher["CONFIG_FILE"] = os.path.normpath(absolute)


def merge(cfg: CfgNode, config_file: str, opts: Sequence[Any] = ()) -> None:
    """Merge a file and KEY VALUE pairs that a user named.

    Raises:
        ConfigError: instead of yacs's errors for unknown keys and wrong types; or the file cannot be read.
    """
    try:
        cfg.merge_from_file(config_file)
        cfg.merge_from_list(list(opts))
    except (KeyError, ValueError, AssertionError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        if isinstance(error, ConfigError):
            raise
        found = " ".join(str(error.args[0] if error.args else type(error).__name__).split())
        if len(found) > 400:  # a whole node
            found = f"{found[:200]} ... {found[-200:]}"
        raise ConfigError(
            "--config-file, or KEY VALUE pairs", found, "known keys, with values of their types"
        ) from error


def add_distillation_config(cfg: CfgNode) -> None:
    """Add the keys of distillation, with their defaults, to a Detectron2 config.

    Every registered method has a node ``DISTILL.<NAME>`` whose keys are the arguments of its constructor, LEVELS and
    TAPS, so a method of your own has one too if it is registered before this is called. The keys of our
    segmentation networks come along (``add_segmentation_config``), since a student or teacher may be one. Former
    names of a method's keys (``Distiller.renamed``) are read by every merge into the config.

    From here on ``cfg.merge_from_file`` finds the teacher's config file relative to the file that names it. (A
    subclass of the config node would be the cleaner way, but yacs refuses to merge two types of node.)

    Raises:
        ConfigError: the config is no CfgNode; a LazyConfig names ``acam_kd.distill`` instead.
    """
    if not isinstance(cfg, CfgNode):
        raise ConfigError(
            "cfg", type(cfg).__name__, "a CfgNode, as from get_cfg()",
            "in a LazyConfig write model = L(acam_kd.distill)(student=..., teacher=..., method=...); see configs/lazy",
        )  # fmt: skip
    cfg.__dict__["merge_from_file"] = partial(merge_from_file, cfg)
    read_former_keys(cfg)
    add_segmentation_config(cfg)
    cfg.DISTILL = CfgNode()
    # What the student is; MODEL.META_ARCHITECTURE is "DistillationMetaArch".
    cfg.DISTILL.STUDENT_META_ARCHITECTURE = "GeneralizedRCNN"
    # A name in DISTILLER_REGISTRY, several as "PKD+KD", or "" for no distillation (the student or inheritance alone).
    cfg.DISTILL.METHOD = "ACAMKD"
    # What is compared by methods that have no TAPS of their own, one or more: "backbone", the backbone's maps (the
    # FPN's); "logits", the map that a SemanticSegmentor predicts, before upsampling; "classes", what a detector's class
    # head predicts; "neck_convs", an FPN's levels before their normalisation, as p3_conv, for FGD. Empty for the
    # recipe's, else for what each method can use first: of a SemanticSegmentor logits,
    # then backbone; else backbone, then classes.
    cfg.DISTILL.TAPS = []
    # The student's levels to distil, by methods that have none of their own; empty for the recipe's, else for all whose
    # stride the teacher has too. Predictions always are. Fewer are cheaper, the finest above all, which has most
    # positions; that the paper distils all of them is an assumption.
    cfg.DISTILL.LEVELS = []
    # Classes that the teacher calls otherwise, each as "student's name=teacher's name". Predictions are compared on the
    # classes that both know, by name.
    cfg.DISTILL.CLASS_MAP = []
    # Whether the student's neck and head start from the teacher's: "auto" if both are detectors of one type.
    cfg.DISTILL.INHERIT = "auto"
    # Only every so many iterations, the first included, are distilled; the others are the student's alone, without
    # teacher and distiller. A departure from the paper: the loss weights stay, so the pull is 1 / PERIOD of what it
    # was. The distiller's gradient is zero in between, while weight decay and momentum still act on its parameters.
    # What Detectron2 prints are medians of the last steps, of whatever kind; metrics.json has each value where it
    # belongs.
    cfg.DISTILL.PERIOD = 1
    # The weight of all of a distillation's losses: "fixed", or "share", such that their gradient at the tapped levels
    # has a SHARE of the task's, by a running estimate. A departure from the papers, for losses of unknown scale.
    cfg.DISTILL.WEIGHT = "fixed"
    cfg.DISTILL.SHARE = 0.5
    # The losses rise linearly to their full weight within so many iterations; from STOP_AT on nothing is distilled, if
    # it is not 0.
    cfg.DISTILL.WARMUP_ITERS = 0
    cfg.DISTILL.STOP_AT = 0
    # Student, teacher and distiller in torch.channels_last, which tensor cores want; not measured on a GPU. Only
    # rounding differs; checkpoints are the same.
    cfg.DISTILL.CHANNELS_LAST = False
    # Iterations between two lines of diagnostics, in the log and in the event storage. With a PERIOD the line comes at
    # the last distilled one of so many, if there is any, so that it never shows what was not measured.
    cfg.DISTILL.LOG_PERIOD = 20
    # Largest norm of all gradients together, 0 for any. SOLVER.CLIP_GRADIENTS clips each parameter alone.
    cfg.DISTILL.MAX_GRADIENT_NORM = 0.0

    # The metric of the best checkpoint, model_best.pth and best.json, as "bbox/AP": higher is better. "auto": bbox/AP
    # or sem_seg/mIoU, if TEST.EVAL_PERIOD is not 0 and there is one test dataset. "": none is kept.
    cfg.DISTILL.BEST = "auto"
    # The decay of an exponential moving average of the student's weights, as 0.999; 0 for none. It is what evaluations
    # see, and what model_best.pth and model_average.pth hold; model_final.pth holds the last weights.
    cfg.DISTILL.EMA = 0.0

    cfg.DISTILL.TEACHER = CfgNode()
    # A Detectron2 config file: a path, or a name in the model zoo such as
    # "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml".
    cfg.DISTILL.TEACHER.CONFIG_FILE = ""
    # Its weights. Empty: those of the zoo for a zoo config. "random": none, for trying things out.
    cfg.DISTILL.TEACHER.WEIGHTS = ""
    # KEY VALUE pairs that override the teacher's config file.
    cfg.DISTILL.TEACHER.OPTS = []
    # The names of its classes, in order, for a teacher whose DATASETS.TRAIN is not registered here, or names others.
    cfg.DISTILL.TEACHER.CLASS_NAMES = []
    # What it computes in: "float32", "float16" or "bfloat16", by autocast, its weights as they are; its features are
    # handed over in the type of the student's. Empty: as the student's step, which SOLVER.AMP decides. A precision
    # other than the student's changes the numbers, and half ones are a departure from the paper.
    cfg.DISTILL.TEACHER.PRECISION = ""
    # Its backbone by torch.compile: the first iteration takes minutes, and so does each of the first few other kinds of
    # image sizes. Needs a C++ compiler, on GPUs triton too. Only rounding differs.
    cfg.DISTILL.TEACHER.COMPILE = False
    # Before the first iteration the teacher is evaluated on 32 images of the first of DATASETS.TEST, where it knows the
    # classes: weights of other data, or a wrong order of the channels, show at once.
    cfg.DISTILL.TEACHER.CHECK = True

    cfg.DISTILL.UNLABELLED = CfgNode()
    # Images without labels (DATASETS.UNLABELLED) a step, of all processes together.
    cfg.DISTILL.UNLABELLED.BATCH = 8
    # The weight of the method's losses on them.
    cfg.DISTILL.UNLABELLED.WEIGHT = 1.0
    # The first iteration that has some.
    cfg.DISTILL.UNLABELLED.START = 0
    # The student's batch norms keep the running statistics of labelled images alone.
    cfg.DISTILL.UNLABELLED.KEEP_NORMS = False

    # The settings of each method. None stands for the recipe's for this kind of model, else the constructor's default;
    # the log says which it was. LEVELS and TAPS are those of the method, in place of the ones above.
    for name, _ in DISTILLER_REGISTRY:
        cfg.DISTILL[name.upper()] = CfgNode(dict.fromkeys(map(str.upper, all_arguments(name))))

    # COCO-format datasets to register: [name, json file, image folder], each.
    cfg.DATASETS.COCO_FORMAT = []
    # Semantic segmentation datasets to register: [name, image folder, label folder, classes], each.
    cfg.DATASETS.SEM_SEG = []
    # Folders of images, or registered datasets whose annotations are ignored: the method's losses are made on them too.
    cfg.DATASETS.UNLABELLED = []


def student_config(cfg: CfgNode) -> CfgNode:
    """Return the config of the student alone, which builds it: no key of distillation is left in it."""
    student = cfg.clone()
    student.__dict__.pop("merge_from_file", None)
    forget_former_keys(student)
    student.defrost()
    if student.MODEL.META_ARCHITECTURE == META_ARCHITECTURE:
        student.MODEL.META_ARCHITECTURE = cfg.DISTILL.STUDENT_META_ARCHITECTURE
    del student["DISTILL"]
    del student.DATASETS["COCO_FORMAT"]
    del student.DATASETS["SEM_SEG"]
    del student.DATASETS["UNLABELLED"]
    return student


def exported_student_config(cfg: CfgNode) -> CfgNode:
    """Return the student's config as it is written to a file: without the keys of ours that the model does not use.

    For a student made of Detectron2's own parts stock Detectron2 loads the file; for one with a part of ours it
    does so after ``add_segmentation_config(get_cfg())``, which adds what was left out here as unchanged.
    """
    student = student_config(cfg)
    for key in ("POLY_LR_POWER", "POLY_LR_CONSTANT_ENDING", "OPTIMIZER"):  # of training
        student.SOLVER.pop(key)
    student.INPUT.CROP.pop("SINGLE_CATEGORY_MAX_AREA")
    if "mobilenetv2" not in student.MODEL.BACKBONE.NAME:
        student.MODEL.pop("MOBILENETV2")
    if student.MODEL.META_ARCHITECTURE != "RepPoints":
        student.MODEL.pop("REPPOINTS")
    stock, ours = get_cfg(), get_cfg()
    add_segmentation_config(ours)
    _remove_unchanged(student, stock, ours)
    return student


def _remove_unchanged(node: CfgNode, stock: CfgNode, ours: CfgNode) -> None:
    """Remove from ``node`` the keys that only ``ours`` has, with the same value; and nodes left empty by that."""
    for key, default in ours.items():
        if key not in node:
            continue
        if isinstance(default, CfgNode):
            _remove_unchanged(node[key], stock.get(key, CfgNode()), default)
            if key not in stock and not node[key]:
                del node[key]
        elif key not in stock and node[key] == default:
            del node[key]


def check_student(cfg: CfgNode, *, resume: bool) -> None:
    """Raise ConfigError for what Detectron2 would say of a student's config late, and deep inside.

    Args:
        cfg: the student's config.
        resume: the run resumes from its last checkpoint, if there is one, and does not read MODEL.WEIGHTS.

    Raises:
        ConfigError: MODEL.WEIGHTS is a local file that does not exist, or test-time augmentation is on for a detector
            that Detectron2 has none for.
    """
    weights = cfg.MODEL.WEIGHTS.split("?")[0]
    resumed = resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    if weights and not resumed and "://" not in weights and not os.path.isfile(weights):
        raise ConfigError("MODEL.WEIGHTS", f"no file {os.path.abspath(weights)}", "the student's weights, or nothing")
    name = cfg.MODEL.META_ARCHITECTURE
    if cfg.TEST.AUG.ENABLED and name in META_ARCH_REGISTRY:
        architecture = META_ARCH_REGISTRY.get(name)
        if isinstance(architecture, type) and not issubclass(architecture, GeneralizedRCNN):
            raise ConfigError("TEST.AUG.ENABLED", True, f"False: Detectron2 has no test-time augmentation for {name}")
