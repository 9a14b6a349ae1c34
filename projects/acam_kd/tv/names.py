"""The command's options for the core's arguments and the settings of a run."""

from __future__ import annotations

__all__ = ["option"]

SAME = (
    "accelerator", "augment", "augmentor", "augmentor_ratio", "augmentor_thresholds", "batch_size", "beside",
    "channels_last", "checkpoint", "checkpoint_period", "class_map", "classes", "config", "confusion", "crop", "cutmix",
    "data", "devices", "distill_period", "ema", "engine", "epochs", "eval_period", "fix", "format", "fraction",
    "freeze_norm", "freeze_stages", "group_by", "image_range", "images", "inherit", "iterations", "leave_out",
    "levels", "logger", "margin", "method", "mixup", "no_teacher_check", "num_nodes", "optimizer", "output",
    "pixel_mean", "pixel_std", "precision", "pseudo_labels", "resume", "schedule", "seed", "share", "size",
    "split_seed", "student", "student_backbone_order", "student_backbone_weights", "student_weights", "taps",
    "teacher", "teacher_class_names", "teacher_classes", "teacher_compile", "teacher_precision", "teacher_weights",
    "unlabelled", "unlabelled_batch", "unlabelled_keep_norms", "unlabelled_start", "unlabelled_weight",
    "val_fraction", "warmup", "weight", "workers",
)  # fmt: skip
"""The settings that are options of the same name."""

OPTIONS = {
    "backbone_weights": "--student-backbone-weights",
    "dataset": "--data, or the files of each split",
    "folder": "the folder of the run",
    "image": "an image",
    "label": "a label image",
    "learning_rate": "--lr",
    "name": "--student",
    "options": "--set",
    "period": "--distill-period",
    "run": "the run",
    "stop_at": "--distill-stop",
    "student_class_names": "the data",
    "student_levels": "--levels",
    "targets": "the data",
    "teacher_levels": "--levels",
    "train_split": "--train",
    "val_split": "--val",
    "warmup_iters": "--distill-warmup",
    "weights": "--student-weights",
}
"""The options with another name, and the settings without one."""


def option(argument: str) -> str:
    """Return the option of an argument; ``PKD.alpha`` is a method's, and one without an option stays as it is.

    Example:
        >>> option("PKD.alpha"), option("student_weights"), option("period"), option("rows")
        ('--set PKD.alpha', '--student-weights', '--distill-period', 'rows')
    """
    if argument in OPTIONS:
        return OPTIONS[argument]
    if argument in SAME:
        return f"--{argument.replace('_', '-')}"
    return f"--set {argument}" if "." in argument else argument
