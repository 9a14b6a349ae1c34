"""The framework-neutral core: torch and fvcore's Registry, nothing else."""

from . import distillers, fusion, losses, masking  # importing registers
from .class_head import ClassHead, Predictions
from .distiller import Distiller, method_arguments
from .features import BACKBONE, CLASSES, LOGITS, TAPS, FeatureSpec, match_levels
from .gradients import clip_gradients
from .inheritance import inherit
from .methods import build_distiller, choose_taps, read_methods
from .model import DistillationModel
from .registry import DISTILLER_REGISTRY, FUSION_REGISTRY, MASKING_REGISTRY
from .taps import FeatureTap, MethodTap
from .targets import IGNORED, Targets
from .teacher import FrozenTeacher, PixelTransform

__all__ = [
    "BACKBONE",
    "CLASSES",
    "DISTILLER_REGISTRY",
    "FUSION_REGISTRY",
    "IGNORED",
    "LOGITS",
    "MASKING_REGISTRY",
    "TAPS",
    "ClassHead",
    "DistillationModel",
    "Distiller",
    "FeatureSpec",
    "FeatureTap",
    "FrozenTeacher",
    "MethodTap",
    "PixelTransform",
    "Predictions",
    "Targets",
    "build_distiller",
    "choose_taps",
    "clip_gradients",
    "distillers",
    "fusion",
    "inherit",
    "losses",
    "masking",
    "match_levels",
    "method_arguments",
    "read_methods",
]
