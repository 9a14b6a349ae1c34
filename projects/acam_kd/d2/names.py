"""The config keys of the core's arguments."""

from __future__ import annotations

__all__ = ["key"]

KEYS = {
    "batch_size": "SOLVER.IMS_PER_BATCH",
    "classes": "DATASETS.SEM_SEG",
    "dataset": "DATASETS.COCO_FORMAT, or --dataset",
    "learning_rate": "SOLVER.BASE_LR",
    "optimizer": "the optimizer",
    "output": "OUTPUT_DIR",
    "resume": "--resume",
    "student": "the student (MODEL, DISTILL.STUDENT_META_ARCHITECTURE)",
    "student_class_names": "the classes in the metadata of DATASETS.TRAIN",
    "student_levels": "DISTILL.LEVELS",
    "targets": "DATASETS.TRAIN",
    "teacher": "DISTILL.TEACHER.CONFIG_FILE",
    "teacher_class_names": "DISTILL.TEACHER.CLASS_NAMES",
    "teacher_compile": "DISTILL.TEACHER.COMPILE",
    "teacher_levels": "DISTILL.LEVELS",
    "teacher_precision": "DISTILL.TEACHER.PRECISION",
    "teacher_weights": "DISTILL.TEACHER.WEIGHTS",
    "unlabelled": "DATASETS.UNLABELLED",
    "unlabelled_batch": "DISTILL.UNLABELLED.BATCH",
    "unlabelled_start": "DISTILL.UNLABELLED.START",
    "unlabelled_weight": "DISTILL.UNLABELLED.WEIGHT",
}
"""The keys that are not ``DISTILL.<ARGUMENT>``."""

OWN = (
    "channels_last", "class_map", "inherit", "levels", "log_period", "max_gradient_norm", "method", "period", "share",
    "stop_at", "taps", "warmup_iters", "weight",
)  # fmt: skip


def key(argument: str) -> str:
    """Return the config key of an argument; one that is a key already stays as it is.

    Example:
        >>> key("PKD.alpha"), key("levels"), key("MODEL.WEIGHTS")
        ('DISTILL.PKD.ALPHA', 'DISTILL.LEVELS', 'MODEL.WEIGHTS')
    """
    if argument in KEYS:
        return KEYS[argument]
    method, dot, name = argument.partition(".")
    if argument in OWN or (dot and name.islower()):
        return f"DISTILL.{argument.upper()}"
    return argument
