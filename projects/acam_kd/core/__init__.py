"""The framework-neutral core: torch and fvcore's Registry, nothing else."""

from typing import Any

from .adapter import Adapter, ModuleAdapter
from .assemble import INHERIT, Plan, assemble
from .class_head import ClassHead, Predictions
from .distillation import Distillation
from .distiller import Distiller, Recipe, method_arguments
from .errors import ConfigError, RunError
from .features import BACKBONE, CLASSES, LOGITS, TAPS, FeatureSpec, match_levels
from .gradients import clip_gradients
from .inheritance import inherit
from .methods import build_distiller
from .options import read_methods, read_request
from .reader import Reader
from .registry import DISTILLER_REGISTRY, FUSION_REGISTRY, MASKING_REGISTRY
from .selection import choose_taps
from .taps import MethodTap, ModuleTap
from .targets import IGNORED, Targets
from .teacher import FrozenTeacher, Pixels, PixelTransform

__all__ = [
    "BACKBONE",
    "CLASSES",
    "DISTILLER_REGISTRY",
    "FUSION_REGISTRY",
    "IGNORED",
    "INHERIT",
    "LOGITS",
    "MASKING_REGISTRY",
    "TAPS",
    "Adapter",
    "ClassHead",
    "ConfigError",
    "Distillation",
    "Distiller",
    "FeatureSpec",
    "FrozenTeacher",
    "MethodTap",
    "ModuleAdapter",
    "ModuleTap",
    "PixelTransform",
    "Pixels",
    "Plan",
    "Predictions",
    "Reader",
    "Recipe",
    "RunError",
    "Targets",
    "assemble",
    "build_distiller",
    "choose_taps",
    "clip_gradients",
    "inherit",
    "match_levels",
    "method_arguments",
    "read_methods",
    "read_request",
]


def __getattr__(name: str) -> Any:
    if name in ("distillers", "fusion", "losses", "masking"):
        raise ImportError(f"acam_kd.core.{name} is gone: the methods are in acam_kd.methods; see docs/migration.md")
    if name in ("DistillationModel", "FeatureTap"):  # of 0.1
        raise ImportError(
            f"acam_kd.core.{name} is gone: write student = acam_kd.distill(student, teacher, method=...); see "
            "docs/migration.md"
        )
    raise AttributeError(f"module 'acam_kd.core' has no attribute {name!r}")
