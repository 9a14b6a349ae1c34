"""Where the class head of a torchvision detector is tapped, and how the teacher's is asked about the same places.

RetinaNet and FCOS predict for every anchor, R-CNNs for the regions that were sampled for the student. The labels are
those that the student was trained with. Class 0 is the background; dense heads have a channel for it, which
is an object nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet

from ..core import CLASSES, IGNORED, FeatureSpec, MethodTap, Predictions
from ..core.features import Features

__all__ = [
    "DenseHead",
    "RegionHead",
    "Regions",
    "backbone_and_classes",
    "check_class_heads",
    "class_head",
    "class_spec",
]

BETWEEN = -2
"""RetinaNet's mark of an anchor that is neither foreground nor background."""


@dataclass(frozen=True)
class Regions:
    """The boxes that were sampled for the student, (R, 4) of each image, and the images' height and width."""

    boxes: Sequence[Tensor]
    image_sizes: Sequence[tuple[int, int]]


class DenseHead:
    """Reads the class head of a RetinaNet or FCOS."""

    def __init__(self, detector: nn.Module) -> None:
        head: Any = detector.head
        self._scores = MethodTap(head.classification_head, "forward")
        self._loss = MethodTap(head, "compute_loss")

    def pop(self) -> Predictions:
        """(N, K, A, 1) logits, (N, A, 1) labels."""
        _, logits = self._scores.pop()
        (targets, _, _, matched), _ = self._loss.pop()
        labels = [_anchor_labels(t["labels"], m, logits.shape[2]) for t, m in zip(targets, matched)]
        return Predictions(_dense(logits), torch.stack(labels)[..., None])

    def clear(self) -> None:
        """Forget what a failed step left."""
        self._scores.clear()
        self._loss.clear()


class RegionHead:
    """Reads the box head of an R-CNN."""

    def __init__(self, detector: nn.Module) -> None:
        heads: Any = detector.roi_heads
        self._samples = MethodTap(heads, "select_training_samples")
        self._pool = MethodTap(heads.box_roi_pool, "forward")
        self._scores = MethodTap(heads.box_predictor, "forward")

    def pop(self) -> Predictions:
        """(R, K, 1, 1) logits, (R, 1, 1) labels, and the regions."""
        _, (_, _, labels, _) = self._samples.pop()
        (_, boxes, image_sizes), _ = self._pool.pop()
        _, (scores, _) = self._scores.pop()
        return Predictions(scores[..., None, None], torch.cat(labels)[:, None, None], Regions(boxes, image_sizes))

    def clear(self) -> None:
        """Forget what a failed step left."""
        for tap in (self._samples, self._pool, self._scores):
            tap.clear()


def _anchor_labels(labels: Tensor, matched: Tensor, background: int) -> Tensor:
    """The class of every anchor, (A,), from the class of every box and the box of every anchor."""
    found = torch.full_like(matched, background)
    foreground = matched >= 0
    found[foreground] = labels[matched[foreground]]
    return found.masked_fill_(matched == BETWEEN, IGNORED)


def _dense(logits: Tensor) -> Tensor:
    """(N, A, K) -> (N, K, A, 1)."""
    return logits.transpose(1, 2)[..., None]


def class_head(student: nn.Module) -> DenseHead | RegionHead:
    """The reader of a student's class head; ``class_spec`` has checked that there is one."""
    return RegionHead(student) if isinstance(student, FasterRCNN) else DenseHead(student)


def class_spec(model: nn.Module) -> FeatureSpec:
    """The classes that a detector's head predicts.

    Raises:
        ValueError: it has no class head that is supported.
    """
    if isinstance(model, FasterRCNN):
        predictor: Any = model.roi_heads.box_predictor
        return FeatureSpec(predictor.cls_score.out_features, 0, logits=True)
    if isinstance(model, (FCOS, RetinaNet)):
        head: Any = model.head
        return FeatureSpec(head.classification_head.num_classes, 0, logits=True, sigmoid=True)
    raise ValueError(
        f"the class head of {type(model).__name__} cannot be distilled; those of RetinaNet, FCOS, Faster and Mask "
        "R-CNN can (options: --method, --taps)"
    )


def check_class_heads(student: nn.Module, teacher: nn.Module) -> None:
    """Raise ValueError for dense heads whose anchors differ."""
    anchors = [_anchors(model) for model in (student, teacher) if not isinstance(model, FasterRCNN)]
    if len(anchors) == 2 and anchors[0] != anchors[1]:
        raise ValueError(
            f"the student, {type(student).__name__}, and the teacher, {type(teacher).__name__}, have different "
            "anchors, so their classes do not correspond (option: --method)"
        )


def _anchors(model: nn.Module) -> Any:
    generator: Any = model.anchor_generator
    return generator.sizes, generator.aspect_ratios


def backbone_and_classes(model: nn.Module, batch: Tensor, regions: Regions | None = None) -> Features:
    """All levels of a detector for a batch; without the class head if an R-CNN is asked about no regions."""
    features: dict[str, Tensor] = model.backbone(batch)  # type: ignore[operator]
    network: Any = model
    if not isinstance(model, FasterRCNN):
        return {**features, CLASSES: _dense(network.head.classification_head(list(features.values())))}
    if regions is None:
        return features
    heads = network.roi_heads
    pooled = heads.box_head(heads.box_roi_pool(features, list(regions.boxes), list(regions.image_sizes)))
    scores, _ = heads.box_predictor(pooled)
    return {**features, CLASSES: scores[..., None, None]}
