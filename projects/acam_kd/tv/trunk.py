"""The trunk of a torchvision model: weights from a file, frozen stages and norms, pixel statistics.

A trunk has five stages, counted as Detectron2's FREEZE_AT does: the stem up to stride 2, and then one at each halving
of the map that it was trained with; ``layer1`` of a ResNet is the second.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from ..core.errors import ConfigError
from ..core.trunk_weights import load_trunk
from ..files import sha256
from .classification import Classifier
from .mobilenets import SSDLiteBackbone
from .norms import convert_norms, is_frozen, is_norm
from .segmentation import Segmentor
from .timm_trunk import TimmPyramid, timm_stages

__all__ = ["FREEZE_AT", "NORMS", "STAGES", "TrunkSettings", "check_pixels", "set_pixels", "set_up", "trunk_of"]

STAGES = 5
NORMS = ("frozen", "trained")
FREEZE_AT = 2
"""The frozen stages of a detector's pretrained trunk, where nothing is said: as in Detectron2."""

logger = logging.getLogger("acam_kd")


@dataclass(frozen=True)
class TrunkSettings:
    """The changes to a student's trunk after it was built.

    Args:
        file: of weights; empty for none.
        order: of the file's channels, ``"RGB"`` or ``"BGR"``.
        freeze_stages: the number of frozen stages, from the stem; None for what torchvision does by itself, or, of a
            detector with ``file``, 2.
        norm: ``"frozen"`` or ``"trained"``, the batch norms of the trunk; empty as above, frozen in a detector.
    """

    file: str = ""
    order: str = "RGB"
    freeze_stages: int | None = None
    norm: str = ""


def trunk_of(model: nn.Module) -> nn.Module | None:
    """Return the trunk of a detector with a pyramid, of MobileNetV2's SSDLite, or of a segmentation model; else None.

    Torchvision's own SSDs change their trunk, so that no classifier's weights fit.
    """
    if isinstance(model, Classifier):
        return None
    network: Any = model.network if isinstance(model, Segmentor) else model
    if isinstance(network.backbone, (SSDLiteBackbone, TimmPyramid)):
        return network.backbone.body
    trunk = network.backbone.body if isinstance(network.backbone, BackboneWithFPN) else network.backbone
    return trunk if isinstance(trunk, IntermediateLayerGetter) else None


def set_up(model: nn.Module, settings: TrunkSettings) -> None:
    """Load, freeze, and log it.

    Raises:
        ConfigError: the file does not fit the trunk, or the model has no trunk.
    """
    trunk = trunk_of(model)
    if trunk is None:
        if settings == TrunkSettings():
            return
        asked = "a file as {student_backbone_weights}" if settings.file else "{freeze_stages} and {freeze_norm}"
        raise ConfigError(
            "student", type(model).__name__, "a detector with a pyramid, or a segmentation model",
            f"its trunk is not a classifier's, so leave out {asked}",
        )  # fmt: skip
    if settings.file:
        found = load_trunk(trunk, settings.file, argument="student_backbone_weights", order=settings.order)
        turned = "; its first convolution was turned from BGR to RGB" if settings.order == "BGR" else ""
        logger.info("trunk loaded: %s, from %s (sha256 %s)%s", found, settings.file, sha256(settings.file), turned)
    detects = bool(settings.file) and not isinstance(model, Segmentor)
    stages = FREEZE_AT if settings.freeze_stages is None and detects else settings.freeze_stages
    norm = settings.norm or ("frozen" if detects else "")
    if stages is not None or norm:
        freeze(trunk, stages, norm)
    if (frozen := describe(trunk)) or settings != TrunkSettings():
        logger.info("trunk: %s", frozen or "nothing is frozen")


def stages_of(trunk: nn.Module) -> dict[str, int]:
    """Return the number of the stage, from 1, of each part of a trunk.

    Dilation, which keeps a map from shrinking in segmentation, does not change the numbers.
    """
    if hasattr(trunk, "feature_info"):
        return timm_stages(trunk)
    stage, numbers = 1, {}
    for name, part in trunk.named_children():
        if found := re.fullmatch(r"layer(\d)", name):
            stage = int(found[1]) + 1
        elif getattr(part, "_is_cn", False):  # torchvision's mark of a MobileNet's block that halves the map
            stage += 1
        numbers[name] = stage
    return numbers


def freeze(trunk: nn.Module, stages: int | None, norm: str) -> None:
    """Freeze the first stages with their norms, and freeze or free the norms of the others.

    A frozen norm is torchvision's ``FrozenBatchNorm2d``, whose statistics stay as they are.

    Args:
        trunk: changed in place.
        stages: their number, 0 to 5; None for those that are frozen already.
        norm: one of ``NORMS``, for the stages that are not frozen; empty leaves them as they are.

    Raises:
        ConfigError: there are fewer stages.
    """
    if stages is not None and not 0 <= stages <= STAGES:
        raise ConfigError("freeze_stages", stages, f"0 to {STAGES}")
    if norm not in ("", *NORMS):
        raise ConfigError("freeze_norm", norm, f"one of {', '.join(NORMS)}")
    last = frozen_stages(trunk) if stages is None else stages
    for name, stage in stages_of(trunk).items():
        part = trunk.get_submodule(name)
        if stages is not None:
            part.requires_grad_(stage > last)
        if stage <= last or norm == "frozen":
            trunk.set_submodule(name, convert_norms(part, frozen=True))
        elif norm == "trained":
            trunk.set_submodule(name, convert_norms(part, frozen=False))


def frozen_stages(trunk: nn.Module) -> int:
    """Return the number of a trunk's first stages that have no parameter to train."""
    trained = [
        stage
        for name, stage in stages_of(trunk).items()
        if any(p.requires_grad for p in trunk.get_submodule(name).parameters())
    ]
    return min(trained, default=STAGES + 1) - 1


def describe(trunk: nn.Module) -> str:
    """Return which of a trunk's stages and norms are frozen, in words; empty if none is."""
    norms = [is_frozen(module) for module in trunk.modules() if is_norm(module)]
    stages = frozen_stages(trunk)
    counted = f"{stages} of {STAGES} stages and {sum(norms)} of {len(norms)} norms are frozen"
    return counted if stages or any(norms) else ""


def check_pixels(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise ConfigError for statistics that are not those of three channels of pixels in [0, 1]."""
    for argument, values, least in (("pixel_mean", mean, 0.0), ("pixel_std", std, 1e-6)):
        if values and (len(values) != 3 or not all(least <= value <= 1 for value in values)):
            allowed = f"three numbers {'above' if least else 'from'} 0, at most 1, in the order RGB"
            raise ConfigError(
                argument, " ".join(map(str, values)), allowed, "those of pixels up to 255 are divided by 255"
            )


def set_pixels(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
    """Set the statistics by which a model normalises its images.

    Args:
        model: from ``build_model``.
        mean, std: of pixels in [0, 1], in the order RGB; empty for the model's own.

    Raises:
        ConfigError: they are no such numbers.
    """
    check_pixels(mean, std)
    place: Any = model if isinstance(model, (Segmentor, Classifier)) else model.transform
    if mean:
        place.image_mean = list(mean)
    if std:
        place.image_std = list(std)
    if mean or std:
        shown = (" ".join(f"{x:g}" for x in values) for values in (place.image_mean, place.image_std))
        logger.info("pixels: mean %s, deviation %s, of [0, 1], RGB", *shown)
