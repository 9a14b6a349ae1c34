"""Where a Detectron2 model is tapped: backbone, a segmentor's map before upsampling, a detector's class head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..core import BACKBONE, CLASSES, LOGITS, TAPS, FeatureSpec, choose_taps
from ..core.features import Features
from .class_heads import class_spec

__all__ = ["backbone_and_logits", "backbone_of", "divisibility", "logits_module", "pyramid", "read_taps"]


def read_taps(taps: Sequence[str], methods: Sequence[str], meta_architecture: str) -> tuple[str, ...]:
    """The taps asked for; empty stands for what the methods use first: logits of a segmentor, a detector's backbone.

    Raises:
        ValueError: an unknown tap, or one that a student of that kind does not have.
    """
    unknown = [tap for tap in taps if tap not in TAPS]
    if unknown or isinstance(taps, str):
        raise ValueError(f"DISTILL.TAPS is {taps!r}; a list of {', '.join(TAPS)} is needed")
    segmentor = meta_architecture == "SemanticSegmentor"
    offered = (LOGITS, BACKBONE) if segmentor else (BACKBONE, CLASSES)
    if any(tap not in offered for tap in taps):
        raise ValueError(
            f"a {meta_architecture} can be tapped at {' and '.join(offered)}, not at {', '.join(taps)} (key: "
            f"DISTILL.TAPS; {LOGITS} is the map of a SemanticSegmentor, {CLASSES} the class head of a detector)"
        )
    return tuple(taps) or choose_taps(methods, offered, meta_architecture)


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
        ValueError: there is none, or its stride is unknown.
    """
    head = getattr(model, "sem_seg_head", None)
    predictor = getattr(head, "predictor", None)
    if not isinstance(predictor, nn.Conv2d) or not isinstance(getattr(head, "common_stride", None), int):
        raise ValueError(
            f"{type(model).__name__} has no `sem_seg_head` with a `predictor`, whose output could be distilled, and a "
            "`common_stride`; choose another one, or distil the backbones (keys: DISTILL.TEACHER.CONFIG_FILE, "
            "MODEL.SEM_SEG_HEAD.NAME, DISTILL.TAPS)"
        )
    return predictor


def pyramid(model: nn.Module, taps: Sequence[str], *, student: bool = False) -> dict[str, FeatureSpec]:
    """Channels and stride of every level that the taps give; a student's class head must be of one stage."""
    levels: dict[str, FeatureSpec] = {}
    if BACKBONE in taps:
        shapes: dict[str, ShapeSpec] = backbone_of(model).output_shape()  # type: ignore[operator]
        levels |= {name: FeatureSpec(channels=s.channels, stride=s.stride) for name, s in shapes.items()}
    if LOGITS in taps:
        predictor: Any = logits_module(model)
        head: Any = model.sem_seg_head
        levels[LOGITS] = FeatureSpec(predictor.out_channels, head.common_stride, logits=True)
    if CLASSES in taps:
        levels[CLASSES] = class_spec(model, student=student)
    return levels


class _Reached(Exception):
    """Carries the logits out of a head, before it scales them up."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits


def _leave(module: nn.Module, args: Any, output: Tensor) -> None:
    raise _Reached(output)


def backbone_and_logits(model: nn.Module, batch: Tensor) -> Features:
    """All levels of a segmentor in evaluation mode for a normalised batch, outside of its own forward.

    Heads differ in what they have besides ``forward``, so it is run, and left where the logits are made: scaled up to
    the image they would take more memory than the rest.
    """
    features: Features = backbone_of(model)(batch)
    handle = logits_module(model).register_forward_hook(_leave)
    try:
        model.sem_seg_head(features)  # type: ignore[operator]
    except _Reached as reached:
        return {**features, LOGITS: reached.logits}
    finally:
        handle.remove()
    raise ValueError(f"{type(model).__name__}: its head does not call its `predictor` (key: DISTILL.TAPS)")


def divisibility(backbone: nn.Module, *, padding: bool = False) -> int:
    """What a backbone needs the sides of a batch to be multiples of, or, with ``padding``, what they are padded to."""
    found = (getattr(backbone, "padding_constraints", None) or {}).get("size_divisibility", 0) if padding else 0
    return found or getattr(backbone, "size_divisibility", 0) or 1
