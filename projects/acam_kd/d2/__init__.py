"""The Detectron2 side. Importing this package registers the meta-architecture and everything it can name."""

from .. import methods  # noqa: F401  (registers them)
from . import mobilenet, reppoints, resnet, sem_seg_heads, transformers  # noqa: F401  (registers them)
from .checkpoint import checkpoint_distiller, guard_gradients
from .coco_datasets import register_coco_datasets
from .config import add_distillation_config, check_student, exported_student_config, student_config
from .datasets import add_dataset_options, check_datasets, register_datasets
from .evaluation import build_evaluator
from .meta_arch import DistillationMetaArch
from .segmentation_config import add_segmentation_config
from .sem_seg_data import build_sem_seg_mapper, sem_seg_augmentations
from .sem_seg_datasets import register_sem_seg_datasets
from .solver import build_lr_scheduler, build_optimizer
from .teacher import load_teacher
from .unlabelled import build_unlabelled_loader, feed_unlabelled

__all__ = [
    "DistillationMetaArch",
    "add_dataset_options",
    "add_distillation_config",
    "add_segmentation_config",
    "build_evaluator",
    "build_lr_scheduler",
    "build_optimizer",
    "build_sem_seg_mapper",
    "build_unlabelled_loader",
    "check_datasets",
    "check_student",
    "checkpoint_distiller",
    "exported_student_config",
    "feed_unlabelled",
    "guard_gradients",
    "load_teacher",
    "register_coco_datasets",
    "register_datasets",
    "register_sem_seg_datasets",
    "sem_seg_augmentations",
    "student_config",
]
