"""Taps on the class head of a torchvision detector, and the teacher's predictions for the same places.

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
from torchvision.models.detection.ssd import SSD

from ..core import CLASSES, IGNORED, ConfigError, FeatureSpec, MethodTap, ModuleTap, Predictions
from ..core.features import Features

__all__ = [
    "DenseHead",
    "RegionHead",
    "Regions",
    "anchors_of",
    "backbone_and_classes",
    "class_head",
    "class_spec",
    "read_scores",
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

    by_regions = False

    def __init__(self, detector: nn.Module) -> None:
        head: Any = detector.head
        self._scores = ModuleTap(head.classification_head, "head.classification_head")
        self._loss = MethodTap(head, "compute_loss")  # no module's call shows the matches
        self.taps = [self._scores, self._loss]

    def read(self) -> Predictions:
        """Return (N, K, A, 1) logits, (N, A, 1) labels."""
        logits = self._scores.read().output
        targets, _, _, matched = self._loss.read().args
        labels = [_anchor_labels(t["labels"], m, logits.shape[2]) for t, m in zip(targets, matched)]
        return Predictions(_dense(logits), torch.stack(labels)[..., None])


class RegionHead:
    """Reads the box head of an R-CNN."""

    by_regions = True

    def __init__(self, detector: nn.Module) -> None:
        heads: Any = detector.roi_heads
        self._samples = MethodTap(heads, "select_training_samples")  # no module's call shows the labels
        self._pool = ModuleTap(heads.box_roi_pool, "roi_heads.box_roi_pool")
        self._scores = ModuleTap(heads.box_predictor, "roi_heads.box_predictor")
        self.taps = [self._scores, self._pool, self._samples]

    def read(self) -> Predictions:
        """Return (R, K, 1, 1) logits, (R, 1, 1) labels, and the regions."""
        _, _, labels, _ = self._samples.read().output
        _, boxes, image_sizes = self._pool.read().args
        scores, _ = self._scores.read().output
        return Predictions(scores[..., None, None], torch.cat(labels)[:, None, None], Regions(boxes, image_sizes))


def _anchor_labels(labels: Tensor, matched: Tensor, background: int) -> Tensor:
    """Return the class of every anchor, (A,), from the class of every box and the box of every anchor."""
    found = torch.full_like(matched, background)
    foreground = matched >= 0
    found[foreground] = labels[matched[foreground]]
    return found.masked_fill_(matched == BETWEEN, IGNORED)


def _dense(logits: Tensor) -> Tensor:
    """(N, A, K) -> (N, K, A, 1)."""
    return logits.transpose(1, 2)[..., None]


def class_head(student: nn.Module) -> DenseHead | RegionHead:
    """Return the reader of a student's class head; ``class_spec`` has checked that there is one."""
    return RegionHead(student) if isinstance(student, FasterRCNN) else DenseHead(student)


def class_spec(model: nn.Module, *, student: bool = True) -> FeatureSpec:
    """Return the classes that a detector's head predicts.

    Raises:
        ConfigError: it has no class head that is supported.
    """
    if isinstance(model, FasterRCNN):
        predictor: Any = model.roi_heads.box_predictor
        return FeatureSpec(predictor.cls_score.out_features, 0, logits=True)
    if isinstance(model, (FCOS, RetinaNet)):
        head: Any = model.head
        return FeatureSpec(head.classification_head.num_classes, 0, logits=True, sigmoid=True, unused=1)
    raise ConfigError(
        "student" if student else "teacher",
        f"the class head of {type(model).__name__}",
        "that of RetinaNet, FCOS, Faster or Mask R-CNN",
        "distil the backbone's features instead, by another {method} or {taps}",
    )


def anchors_of(model: nn.Module) -> list[Tensor] | None:
    """Return sizes and aspect ratios of a dense detector's anchors, level by level; None for an R-CNN."""
    if isinstance(model, FasterRCNN):
        return None
    generator: Any = model.anchor_generator
    return [torch.tensor(values, dtype=torch.float32) for values in (*generator.sizes, *generator.aspect_ratios)]


def backbone_and_classes(model: nn.Module, batch: Tensor, regions: Regions | None = None) -> Features:
    """Return all levels of a detector for a batch; without the class head if an R-CNN is asked about no regions."""
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


def read_scores(model: nn.Module, features: Features) -> dict[str, Tensor]:
    """Return the largest probability of a class at every position of every level, (N, 1, H, W), by level.

    Of an R-CNN it is the objectness.
    """
    network: Any = model
    maps = list(features.values())
    if isinstance(model, FasterRCNN):
        objectness, _ = network.rpn.head(maps)
        return {level: x.sigmoid().amax(1, keepdim=True) for level, x in zip(features, objectness)}
    logits = network.head.classification_head(maps)  # (N, H W anchors of all levels, K)
    classes = logits.softmax(2)[..., 1:] if isinstance(model, SSD) else logits.sigmoid()
    largest = classes.amax(2)
    anchors = network.anchor_generator.num_anchors_per_location()
    sizes = [x.shape[2] * x.shape[3] * a for x, a in zip(maps, anchors)]
    parts = largest.split(sizes, 1)
    return {
        level: part.view(len(part), *x.shape[2:], -1).amax(3)[:, None]
        for (level, x), part in zip(features.items(), parts)
    }
