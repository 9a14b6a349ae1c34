"""The Detectron2 side. Importing this package registers the meta-architecture and everything it can name."""

from .config import add_distillation_config, merge_config_file, student_config
from .datasets import check_num_classes, register_coco_datasets
from .evaluation import build_evaluator
from .meta_arch import DistillationMetaArch
from .training import checkpoint_distiller, guard_gradients

__all__ = [
    "DistillationMetaArch",
    "add_distillation_config",
    "build_evaluator",
    "check_num_classes",
    "checkpoint_distiller",
    "guard_gradients",
    "merge_config_file",
    "register_coco_datasets",
    "student_config",
]
