"""Where a Detectron2 model is tapped: at its backbone, or, of a segmentor, at the predicted map before upsampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..core import LOGITS, FeatureSpec
from ..core.features import Features

__all__ = ["backbone_and_logits", "backbone_of", "logits_module", "pyramid", "read_taps"]

TAPS = ("backbone", LOGITS)


def read_taps(taps: Sequence[str], meta_architecture: str) -> tuple[str, ...]:
    """The taps asked for; empty stands for the paper's: logits for a segmentor, the backbone's pyramid otherwise.

    Raises:
        ValueError: an unknown tap, or logits of a model that predicts no map.
    """
    unknown = [tap for tap in taps if tap not in TAPS]
    if unknown or isinstance(taps, str):
        raise ValueError(f"DISTILL.TAPS is {taps!r}; a list of {', '.join(TAPS)} is needed")
    if LOGITS in taps and meta_architecture != "SemanticSegmentor":
        raise ValueError(
            f"a {meta_architecture} has no map of logits to distil, a SemanticSegmentor has (key: DISTILL.TAPS)"
        )
    return tuple(taps) or (LOGITS if meta_architecture == "SemanticSegmentor" else "backbone",)


def backbone_of(model: nn.Module) -> nn.Module:
    """Its backbone.

    Raises:
        ValueError: it has none.
    """
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise ValueError(f"{type(model).__name__} has no `backbone`, so its features cannot be reached")
    return backbone


def logits_module(model: nn.Module) -> nn.Module:
    """The convolution whose output is the map of logits: Detectron2 calls it ``predictor`` in all of its heads.

    Raises:
        ValueError: there is none.
    """
    predictor = getattr(getattr(model, "sem_seg_head", None), "predictor", None)
    if not isinstance(predictor, nn.Conv2d):
        raise ValueError(
            f"{type(model).__name__} has no `sem_seg_head.predictor` whose output could be distilled; distil its "
            "backbone (key: DISTILL.TAPS)"
        )
    return predictor


def pyramid(model: nn.Module, taps: Sequence[str]) -> dict[str, FeatureSpec]:
    """Channels and stride of every level that the taps give."""
    levels: dict[str, FeatureSpec] = {}
    if "backbone" in taps:
        shapes: dict[str, ShapeSpec] = backbone_of(model).output_shape()  # type: ignore[operator]
        levels |= {name: FeatureSpec(channels=s.channels, stride=s.stride) for name, s in shapes.items()}
    if LOGITS in taps:
        stride: Any = model.sem_seg_head.common_stride  # type: ignore[union-attr]
        levels[LOGITS] = FeatureSpec(logits_module(model).out_channels, stride, logits=True)  # type: ignore[arg-type]
    return levels


def backbone_and_logits(model: nn.Module, batch: Tensor) -> Features:
    """All levels of a segmentor for a normalised batch, outside of its own forward."""
    features: Features = backbone_of(model)(batch)
    head: Any = model.sem_seg_head
    if hasattr(head, "layers"):
        return {**features, LOGITS: head.layers(features)}
    maps: list[Tensor] = []  # Detectron2's DeepLabV3Head has nothing that stops before upsampling
    handle = head.predictor.register_forward_hook(lambda _, __, output: maps.append(output))
    try:
        head(features)
    finally:
        handle.remove()
    return {**features, LOGITS: maps[0]}
