"""The framework-neutral core: torch and fvcore's Registry, nothing else."""

from . import distillers, fusion, losses, masking  # importing registers
from .distiller import Distiller, method_arguments
from .features import LOGITS, TAPS, FeatureSpec, FeatureTap, match_levels
from .gradients import clip_gradients
from .inheritance import inherit
from .model import DistillationModel
from .registry import DISTILLER_REGISTRY, FUSION_REGISTRY, MASKING_REGISTRY
from .teacher import FrozenTeacher, PixelTransform

__all__ = [
    "DISTILLER_REGISTRY",
    "FUSION_REGISTRY",
    "LOGITS",
    "MASKING_REGISTRY",
    "TAPS",
    "DistillationModel",
    "Distiller",
    "FeatureSpec",
    "FeatureTap",
    "FrozenTeacher",
    "PixelTransform",
    "clip_gradients",
    "distillers",
    "fusion",
    "inherit",
    "losses",
    "masking",
    "match_levels",
    "method_arguments",
]
