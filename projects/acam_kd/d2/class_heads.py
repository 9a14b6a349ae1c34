"""Where the class head of a Detectron2 detector is tapped, and how the teacher's is asked about the same places.

Two kinds: dense ones, RetinaNet's and FCOS's, which predict for every anchor, and the box head of R-CNNs, which
predicts for the regions that were sampled for the student. The labels are those that the student was trained with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes
from torch import Tensor, nn

from ..core import CLASSES, FeatureSpec, MethodTap, Predictions
from ..core.features import Features

__all__ = ["DenseHead", "RegionHead", "backbone_and_classes", "check_class_heads", "class_head", "class_spec"]


class DenseHead:
    """Reads the class head of a RetinaNet or FCOS."""

    def __init__(self, detector: DenseDetector) -> None:
        self._num_classes = detector.num_classes
        self._head = MethodTap(detector.head, "forward")
        self._labels = MethodTap(detector, "label_anchors")

    def pop(self) -> Predictions:
        """(N, K, A, 1) logits, (N, A, 1) labels."""
        _, (logits, *_) = self._head.pop()
        _, (labels, _) = self._labels.pop()
        return Predictions(_dense(logits, self._num_classes), torch.stack(labels)[..., None])

    def clear(self) -> None:
        """Forget what a failed step left."""
        self._head.clear()
        self._labels.clear()


class RegionHead:
    """Reads the box head of an R-CNN with one stage."""

    def __init__(self, detector: nn.Module) -> None:
        heads: Any = detector.roi_heads
        self._sigmoid = heads.box_predictor.use_sigmoid_ce
        self._proposals = MethodTap(heads, "label_and_sample_proposals")
        self._pooler = MethodTap(heads.box_pooler, "forward")
        self._scores = MethodTap(heads.box_predictor, "forward")

    def pop(self) -> Predictions:
        """(R, K, 1, 1) logits, (R, 1, 1) labels, and the sampled boxes of each image."""
        _, (scores, _) = self._scores.pop()
        _, proposals = self._proposals.pop()
        (_, boxes), _ = self._pooler.pop()
        labels = torch.cat([p.gt_classes for p in proposals])
        return Predictions(_regions(scores, self._sigmoid), labels[:, None, None], boxes)

    def clear(self) -> None:
        """Forget what a failed step left."""
        for tap in (self._scores, self._proposals, self._pooler):
            tap.clear()


def _dense(logits: Sequence[Tensor], num_classes: int) -> Tensor:
    """(N, anchors * K, H, W) of each level -> (N, K, A, 1)."""
    return torch.cat([permute_to_N_HWA_K(x, num_classes) for x in logits], 1).transpose(1, 2)[..., None]


def _regions(scores: Tensor, sigmoid: bool) -> Tensor:
    """(R, K + 1) -> (R, K + 1, 1, 1), or, where each class is a sigmoid, without the background, which is none."""
    return (scores[:, :-1] if sigmoid else scores)[..., None, None]


def class_head(student: nn.Module) -> DenseHead | RegionHead:
    """The reader of a student's class head; ``class_spec`` has checked that there is one."""
    return DenseHead(student) if isinstance(student, DenseDetector) else RegionHead(student)


def class_spec(model: nn.Module, *, student: bool) -> FeatureSpec:
    """The classes that a detector's head predicts.

    Raises:
        ValueError: it has no class head that is supported.
    """
    if isinstance(model, DenseDetector):
        return FeatureSpec(model.num_classes, 0, logits=True, sigmoid=True)
    heads: Any = getattr(model, "roi_heads", None)
    cascade = isinstance(getattr(heads, "box_predictor", None), nn.ModuleList)
    if not isinstance(heads, StandardROIHeads) or (student and cascade):
        regions = f" with {type(heads).__name__}" if heads is not None else ""
        raise ValueError(
            f"the class head of a {type(model).__name__}{regions} cannot be distilled; those of "
            "RetinaNet, FCOS and StandardROIHeads can, and, of a teacher, the first stage of CascadeROIHeads (keys: "
            "DISTILL.METHOD, DISTILL.TAPS)"
        )
    sigmoid = bool(_first(heads.box_predictor).use_sigmoid_ce)
    return FeatureSpec(heads.num_classes + (not sigmoid), 0, logits=True, sigmoid=sigmoid)


def check_class_heads(student: nn.Module, teacher: nn.Module) -> None:
    """Raise ValueError for a dense head beside one of regions, and for dense heads with different anchors."""
    dense = [isinstance(model, DenseDetector) for model in (student, teacher)]
    names = f"the student is a {type(student).__name__}, the teacher a {type(teacher).__name__}"
    if dense[0] != dense[1]:
        raise ValueError(f"{names}: one predicts for anchors, the other for regions (key: DISTILL.METHOD)")
    if dense[0] and not _same_anchors(student, teacher):
        raise ValueError(f"{names}, and their anchors differ, so their classes do not correspond (key: DISTILL.METHOD)")


def _same_anchors(student: nn.Module, teacher: nn.Module) -> bool:
    """Whether both predict for the same anchors, up to the rounding of a config file."""
    own: Any = student.anchor_generator
    other: Any = teacher.anchor_generator
    if (student.head_in_features, own.strides) != (teacher.head_in_features, other.strides):
        return False
    cells = zip(own.cell_anchors, other.cell_anchors)
    return all(a.shape == b.shape and (a.is_meta or torch.allclose(a, b, rtol=0, atol=0.1)) for a, b in cells)


def _first(module: nn.Module) -> Any:
    return module[0] if isinstance(module, nn.ModuleList) else module


def backbone_and_classes(model: nn.Module, batch: Tensor, regions: Sequence[Boxes] | None = None) -> Features:
    """All levels of a detector for a batch; without the class head if an R-CNN is asked about no regions."""
    features: dict[str, Tensor] = model.backbone(batch)  # type: ignore[operator]
    if isinstance(model, DenseDetector):
        logits, *_ = model.head([features[name] for name in model.head_in_features])
        return {**features, CLASSES: _dense(logits, model.num_classes)}
    if regions is None:
        return features
    heads: Any = model.roi_heads
    pooled = heads.box_pooler([features[name] for name in heads.box_in_features], list(regions))
    predictor = _first(heads.box_predictor)
    scores, _ = predictor(_first(heads.box_head)(pooled))
    return {**features, CLASSES: _regions(scores, predictor.use_sigmoid_ce)}
