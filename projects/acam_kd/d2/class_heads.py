"""Taps on the class head of a Detectron2 detector, and the teacher's predictions for the same places.

Two kinds: dense ones, of RetinaNet, FCOS and RepPoints, which predict for every anchor, and the box head of R-CNNs,
which predicts for the regions that were sampled for the student. The labels are those that the student was trained
with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes
from torch import Tensor, nn

from ..core import CLASSES, ConfigError, FeatureSpec, MethodTap, ModuleTap, Predictions
from ..core.features import Features
from ..core.scores import ReadScores

__all__ = [
    "DenseHead",
    "RegionHead",
    "anchors_of",
    "backbone_and_classes",
    "class_head",
    "class_spec",
    "score_reader",
]


class DenseHead:
    """Reads the class head of a RetinaNet, FCOS or RepPoints."""

    by_regions = False

    def __init__(self, detector: DenseDetector) -> None:
        self._num_classes = detector.num_classes
        self._head = ModuleTap(detector.head, "head")
        self._labels = MethodTap(detector, "label_anchors")  # no module's call shows the labels
        self.taps = [self._head, self._labels]

    def read(self) -> Predictions:
        """Return (N, K, A, 1) logits, (N, A, 1) labels."""
        logits, *_ = self._head.read().output
        labels, _ = self._labels.read().output
        return Predictions(_dense(logits, self._num_classes), torch.stack(labels)[..., None])


class RegionHead:
    """Reads the box head of an R-CNN with one stage."""

    by_regions = True

    def __init__(self, detector: nn.Module) -> None:
        heads: Any = detector.roi_heads
        self._sigmoid = _sigmoid(heads)
        self._heads = ModuleTap(heads, "roi_heads")  # returns the proposals that it sampled
        self._pooler = ModuleTap(heads.box_pooler, "roi_heads.box_pooler")
        self._scores = ModuleTap(heads.box_predictor, "roi_heads.box_predictor")
        self.taps = [self._heads, self._pooler, self._scores]

    def read(self) -> Predictions:
        """Return (R, K, 1, 1) logits, (R, 1, 1) labels, and the sampled boxes of each image."""
        scores = _scores(self._scores.read().output)
        proposals, _ = self._heads.read().output
        _, boxes = self._pooler.read().args
        labels = torch.cat([p.gt_classes for p in proposals])
        return Predictions(_regions(scores, self._sigmoid), labels[:, None, None], boxes)


def _dense(logits: Sequence[Tensor], num_classes: int) -> Tensor:
    """(N, anchors * K, H, W) of each level -> (N, K, A, 1)."""
    return torch.cat([permute_to_N_HWA_K(x, num_classes) for x in logits], 1).transpose(1, 2)[..., None]


def _regions(scores: Tensor, sigmoid: bool) -> Tensor:
    """(R, K + 1) -> (R, K + 1, 1, 1), or, where each class is a sigmoid, without the background, which is none."""
    return (scores[:, :-1] if sigmoid else scores)[..., None, None]


def _scores(predicted: Any) -> Tensor:
    """Return the class scores, (R, K + 1), of a box predictor's output.

    Raises:
        ConfigError: it does not begin with such a tensor.
    """
    scores = predicted[0] if isinstance(predicted, (tuple, list)) and predicted else predicted
    if not isinstance(scores, Tensor) or scores.dim() != 2:
        raise ConfigError(
            "student", f"a {type(predicted).__name__} from its box predictor", "class scores (R, K + 1) first",
            "choose a {method} for the backbone's features",
        )  # fmt: skip
    return scores


def _sigmoid(heads: Any) -> bool:
    """Say whether each class is a sigmoid; a predictor that says nothing has a softmax, as all had once."""
    return bool(getattr(_first(heads.box_predictor), "use_sigmoid_ce", False))


def class_head(student: nn.Module) -> DenseHead | RegionHead:
    """Return the reader of a student's class head; ``class_spec`` has checked that there is one."""
    return DenseHead(student) if isinstance(student, DenseDetector) else RegionHead(student)


def class_spec(model: nn.Module, *, student: bool) -> FeatureSpec:
    """Return the classes that a detector's head predicts.

    Raises:
        ConfigError: it has no class head that is supported.
    """
    if isinstance(model, DenseDetector):
        return FeatureSpec(model.num_classes, 0, logits=True, sigmoid=True)
    heads: Any = getattr(model, "roi_heads", None)
    cascade = isinstance(getattr(heads, "box_predictor", None), nn.ModuleList)
    if not isinstance(heads, StandardROIHeads) or (student and cascade):
        regions = f" with {type(heads).__name__}" if heads is not None else ""
        raise ConfigError(
            "student" if student else "teacher",
            f"the class head of a {type(model).__name__}{regions}",
            "that of RetinaNet, FCOS, RepPoints, StandardROIHeads, or, of a teacher, CascadeROIHeads' first stage",
            "distil the backbone's features instead, by another {method}",
        )
    sigmoid = _sigmoid(heads)
    return FeatureSpec(heads.num_classes + (not sigmoid), 0, logits=True, sigmoid=sigmoid)


def anchors_of(model: nn.Module) -> list[Tensor] | None:
    """Return strides and cell anchors of a dense detector, strides alone if it has none; None for another model."""
    if not isinstance(model, DenseDetector):
        return None
    generator: Any = getattr(model, "anchor_generator", None)
    if generator is None:  # cells and strides alone, as of RepPoints
        return [torch.tensor([float(stride) for stride in model.strides])]
    strides = torch.tensor([float(stride) for stride in generator.strides])
    return [strides, *generator.cell_anchors]


def _first(module: nn.Module) -> Any:
    return module[0] if isinstance(module, nn.ModuleList) else module


def backbone_and_classes(model: nn.Module, batch: Tensor, regions: Sequence[Boxes] | None = None) -> Features:
    """Return all levels of a detector for a batch; without the class head if an R-CNN is asked about no regions."""
    features: dict[str, Tensor] = model.backbone(batch)  # type: ignore[operator]
    if isinstance(model, DenseDetector):
        logits, *_ = model.head([features[name] for name in model.head_in_features])
        return {**features, CLASSES: _dense(logits, model.num_classes)}
    if regions is None:
        return features
    heads: Any = model.roi_heads
    pooled = heads.box_pooler([features[name] for name in heads.box_in_features], list(regions))
    scores = _scores(_first(heads.box_predictor)(_first(heads.box_head)(pooled)))
    return {**features, CLASSES: _regions(scores, _sigmoid(heads))}


def score_reader(model: nn.Module) -> ReadScores | None:
    """Return the function that reads a detector's scores of every position; None for a model without any."""
    if isinstance(model, DenseDetector):
        return _class_scores
    return _objectness if isinstance(getattr(model, "proposal_generator", None), RPN) else None


def _class_scores(model: nn.Module, features: Features) -> dict[str, Tensor]:
    """Return the largest sigmoid of a class, (N, 1, H, W), of the levels that a RetinaNet's or FCOS's head sees."""
    network: Any = model
    logits, *_ = network.head([features[name] for name in network.head_in_features])
    return {name: x.sigmoid().amax(1, keepdim=True) for name, x in zip(network.head_in_features, logits)}


def _objectness(model: nn.Module, features: Features) -> dict[str, Tensor]:
    """Return the largest objectness of an anchor, (N, 1, H, W), of the levels that an RPN sees."""
    rpn: Any = model.proposal_generator
    logits, _ = rpn.rpn_head([features[name] for name in rpn.in_features])
    return {name: x.sigmoid().amax(1, keepdim=True) for name, x in zip(rpn.in_features, logits)}
