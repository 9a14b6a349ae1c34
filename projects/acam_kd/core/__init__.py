"""The framework-neutral core: torch and fvcore's Registry, nothing else."""

from . import distillers, fusion, losses, masking  # importing registers
from .distiller import Distiller
from .features import FeatureSpec, FeatureTap, match_levels
from .inheritance import inherit
from .model import DistillationModel
from .registry import DISTILLER_REGISTRY, FUSION_REGISTRY, MASKING_REGISTRY
from .teacher import FrozenTeacher, PixelTransform

__all__ = [
    "DISTILLER_REGISTRY",
    "FUSION_REGISTRY",
    "MASKING_REGISTRY",
    "DistillationModel",
    "Distiller",
    "FeatureSpec",
    "FeatureTap",
    "FrozenTeacher",
    "PixelTransform",
    "distillers",
    "fusion",
    "inherit",
    "losses",
    "masking",
    "match_levels",
]
