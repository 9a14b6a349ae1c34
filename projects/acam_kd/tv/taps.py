"""Where a torchvision model is tapped: backbone, a segmentation model's map before upsampling, a class head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.segmentation import LRASPP

from ..core import BACKBONE, CLASSES, LOGITS, TAPS, FeatureSpec, choose_taps
from ..core.features import Features
from ..errors import options_for_keys
from .class_heads import class_spec
from .models import PROBE, plain
from .segmentation import Segmentor

__all__ = ["backbone_and_logits", "logits_module", "pyramid", "read_taps", "side_of"]


@options_for_keys()
def read_taps(taps: Sequence[str], methods: Sequence[str], student: nn.Module, teacher: nn.Module) -> tuple[str, ...]:
    """The taps asked for; empty stands for what the methods use first: logits of segmentation, a detector's backbone.

    Raises:
        ValueError: an unknown tap, or one that a model of that kind does not have.
    """
    unknown = [tap for tap in taps if tap not in TAPS]
    if unknown:
        raise ValueError(f"no tap is called {unknown[0]!r}; known: {', '.join(TAPS)} (option: --taps)")
    asked = tuple(taps) or choose_taps(methods, _offered(student), type(plain(student)).__name__)
    for role, model in {id(student): ("student", student), id(teacher): ("teacher", teacher)}.values():
        offered = _offered(model)
        if any(tap not in offered for tap in asked):
            raise ValueError(
                f"the {role}, a {type(plain(model)).__name__}, can be tapped at {' and '.join(offered)}, not at "
                f"{', '.join(asked)} (options: --taps, --method; {LOGITS} is the map of a segmentation model, "
                f"{CLASSES} the class head of a detector)"
            )
    return asked


def _offered(model: nn.Module) -> tuple[str, ...]:
    return (LOGITS, BACKBONE) if isinstance(model, Segmentor) else (BACKBONE, CLASSES)


def logits_module(model: nn.Module) -> nn.Module:
    """The module of a segmentation model whose output is its map of logits before upsampling."""
    return plain(model).classifier  # type: ignore[return-value]


def backbone_and_logits(model: nn.Module, batch: Tensor) -> Features:
    """All levels of a segmentation model for a normalised batch, outside of its own forward."""
    network = plain(model)
    features: dict[str, Tensor] = network.backbone(batch)  # type: ignore[operator]
    logits: Tensor = network.classifier(features if isinstance(network, LRASPP) else features["out"])  # type: ignore[operator]
    return {**features, LOGITS: logits}


def side_of(model: nn.Module) -> int:
    """A side of the images by which the model's strides can be measured: SSD's is fixed."""
    fixed = getattr(getattr(model, "transform", None), "fixed_size", None)
    return int(fixed[0]) if fixed else PROBE


@torch.no_grad()
def pyramid(model: nn.Module, side: int, taps: Sequence[str] = (BACKBONE, LOGITS)) -> dict[str, FeatureSpec]:
    """Channels and stride of every level that the taps give, measured on an empty image of that side.

    Of the backbone's two maps in a segmentation model that of the auxiliary head is left out; a detector has no logits.
    """
    training = model.training
    model.eval()  # DeepLabV3 normalises over the batch, which one image is none of
    batch = torch.zeros(1, 3, side, side, device=next(model.parameters()).device)
    found: Features = backbone_and_logits(model, batch) if isinstance(model, Segmentor) else model.backbone(batch)  # type: ignore[operator]
    model.train(training)
    levels = {
        name: FeatureSpec(channels=x.shape[1], stride=round(side / x.shape[-1]), logits=name == LOGITS)
        for name, x in found.items()
        if (LOGITS if name == LOGITS else BACKBONE) in taps and not (name == "aux" and isinstance(model, Segmentor))
    }
    return levels | ({CLASSES: class_spec(model)} if CLASSES in taps else {})
