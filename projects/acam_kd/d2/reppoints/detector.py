"""The meta-architecture: labels, losses and boxes around the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import batched_nms
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor

from ...core.errors import ConfigError
from .assign import IGNORED, assign_by_overlap, assign_by_position
from .config import check_reppoints_config
from .head import RepPointsHead
from .losses import box_loss, class_loss
from .points import grid_of

__all__ = ["RepPoints"]


@META_ARCH_REGISTRY.register()
class RepPoints(DenseDetector):
    """Yang et al., "RepPoints: Point Set Representation for Object Detection", ICCV 2019.

    An object is nine points, predicted twice for each cell of the pyramid, without anchors. The losses are
    ``loss_cls``, ``loss_points_init`` and ``loss_points_refine``. An object that overlaps no first box is left to the
    first stage, unless ``match_without_overlap`` says otherwise; the event storage counts such objects.

    Args:
        backbone: its levels have strides that are powers of two.
        head: a ``RepPointsHead``.
        head_in_features: the names of the levels, from the finest.
        num_classes: K.
        pixel_mean, pixel_std: of the images.
        point_scale, points_per_object: see ``assign_by_position``.
        iou_thresholds, match_without_overlap: see ``assign_by_overlap``.
        focal_loss_alpha, focal_loss_gamma, smooth_l1_beta, init_loss_weight, refine_loss_weight: of the losses.
        test_score_thresh: detections have a larger score.
        test_topk_candidates: pairs of cell and class that are kept of a level.
        test_nms_thresh: IoU of suppression, within a class.
        max_detections_per_image: the number of detections.
        vis_period, input_format: as of Detectron2's detectors.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: RepPointsHead,
        head_in_features: Sequence[str],
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        point_scale: float = 4,
        points_per_object: int = 1,
        iou_thresholds: Sequence[float] = (0.4, 0.5),
        match_without_overlap: bool = False,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        smooth_l1_beta: float = 0.11,
        init_loss_weight: float = 0.5,
        refine_loss_weight: float = 1.0,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.5,
        max_detections_per_image: int = 100,
        vis_period: int = 0,
        input_format: str = "BGR",
    ) -> None:
        super().__init__(backbone, head, list(head_in_features), pixel_mean=pixel_mean, pixel_std=pixel_std)
        shapes = backbone.output_shape()
        self.strides = [shapes[name].stride for name in self.head_in_features]
        self.num_classes = num_classes
        self.point_scale, self.points_per_object = point_scale, points_per_object
        self.iou_thresholds, self.match_without_overlap = tuple(iou_thresholds), match_without_overlap
        self.focal = {"alpha": focal_loss_alpha, "gamma": focal_loss_gamma}
        self.smooth_l1_beta = smooth_l1_beta
        self.init_loss_weight, self.refine_loss_weight = init_loss_weight, refine_loss_weight
        self.test_score_thresh, self.test_topk_candidates = test_score_thresh, test_topk_candidates
        self.test_nms_thresh, self.max_detections_per_image = test_nms_thresh, max_detections_per_image
        self.vis_period, self.input_format = vis_period, input_format

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the arguments that a config stands for.

        Raises:
            ConfigError: a value of MODEL.REPPOINTS cannot be built.
        """
        node = cfg.MODEL.REPPOINTS
        check_reppoints_config(node)
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        if unknown := [name for name in node.IN_FEATURES if name not in shapes]:
            raise ConfigError("MODEL.REPPOINTS.IN_FEATURES", unknown[0], f"levels of the backbone: {', '.join(shapes)}")
        return {
            "backbone": backbone,
            "head": RepPointsHead(cfg, [shapes[name] for name in node.IN_FEATURES]),
            "head_in_features": node.IN_FEATURES,
            "num_classes": node.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "point_scale": node.POINT_SCALE,
            "points_per_object": node.POINTS_PER_OBJECT,
            "iou_thresholds": node.IOU_THRESHOLDS,
            "match_without_overlap": node.MATCH_WITHOUT_OVERLAP,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
            "smooth_l1_beta": node.SMOOTH_L1_LOSS_BETA,
            "init_loss_weight": node.INIT_LOSS_WEIGHT,
            "refine_loss_weight": node.REFINE_LOSS_WEIGHT,
            "test_score_thresh": node.SCORE_THRESH_TEST,
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": node.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "vis_period": cfg.VIS_PERIOD,
            "input_format": cfg.INPUT.FORMAT,
        }

    def forward_training(
        self, images: ImageList, features: Sequence[Tensor], predictions: Any, gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        """Return the losses of a batch."""
        logits, init, refine = predictions
        grid = grid_of(logits, self.strides)
        init_boxes, refine_boxes = (grid.boxes([self.head.boxes(x) for x in each]) for each in (init, refine))
        labels, wanted = self.label_anchors(init_boxes.detach(), gt_instances)
        objects = [
            assign_by_position(grid, x.gt_boxes.tensor, scale=self.point_scale, per_object=self.points_per_object)
            for x in gt_instances
        ]
        of_classes = torch.stack(labels)
        positive = (of_classes >= 0) & (of_classes < self.num_classes)
        first = torch.stack(objects) >= 0
        first_wanted = torch.stack([_boxes_of(x, i) for x, i in zip(gt_instances, objects)])
        sizes, settings = self.point_scale * grid.strides, {"beta": self.smooth_l1_beta}
        scores = torch.cat([permute_to_N_HWA_K(x, self.num_classes) for x in logits], 1)
        number, first_number = _number(positive), _number(first)
        on_first = box_loss(init_boxes, first_wanted, first, sizes, **settings)
        on_second = box_loss(refine_boxes, torch.stack(wanted), positive, sizes, **settings)
        return {
            "loss_cls": class_loss(scores, of_classes, **self.focal) / number,
            "loss_points_init": self.init_loss_weight * on_first / first_number,
            "loss_points_refine": self.refine_loss_weight * on_second / number,
        }

    @torch.no_grad()
    def label_anchors(self, init_boxes: Tensor, gt_instances: list[Instances]) -> tuple[list[Tensor], list[Tensor]]:
        """Label every cell by its first box.

        Args:
            init_boxes: (N, R, 4), in pixels.
            gt_instances: the objects of each image.

        Returns:
            For each image the labels (R,), K for background and -1 for ignored cells, and the boxes (R, 4) of the
            cells that have an object.
        """
        labels, boxes, alone = [], [], init_boxes.new_zeros(())
        low, high = self.iou_thresholds
        for candidates, objects in zip(init_boxes, gt_instances):
            index, missed = assign_by_overlap(
                candidates, objects.gt_boxes.tensor, low=low, high=high, without_overlap=self.match_without_overlap
            )
            boxes.append(_boxes_of(objects, index))
            known = objects.gt_classes[index.clamp_min(0)] if len(objects) else torch.zeros_like(index)
            known = torch.where(index >= 0, known, self.num_classes)
            labels.append(known.masked_fill(index == IGNORED, -1))
            alone = alone + missed
        if has_event_storage():
            positive = sum(((x >= 0) & (x < self.num_classes)).sum() for x in labels)
            storage = get_event_storage()
            storage.put_scalar("reppoints/positives", float(positive) / max(len(labels), 1))
            storage.put_scalar("reppoints/objects_without_overlap", float(alone))
        return labels, boxes

    def forward_inference(self, images: ImageList, features: Sequence[Tensor], predictions: Any) -> list[Instances]:
        """Return the detections of each image, in pixels of the batch."""
        logits, _, refine = predictions
        grid = grid_of(logits, self.strides)
        boxes = grid.boxes([self.head.boxes(x) for x in refine])
        scores = [permute_to_N_HWA_K(x, self.num_classes).float().sigmoid() for x in logits]
        cells = [x.shape[1] for x in scores]
        return [
            self._detect([x[i] for x in scores], torch.split(boxes[i], cells), size)
            for i, size in enumerate(images.image_sizes)
        ]

    def _detect(self, scores: Sequence[Tensor], boxes: Sequence[Tensor], size: tuple[int, int]) -> Instances:
        """Return the detections of one image from the scores (R, K) and boxes (R, 4) of its levels."""
        kept = [
            Instances(size, scores=best, pred_boxes=Boxes(boxes_of_level[cells]), pred_classes=classes)
            for best, cells, classes, boxes_of_level in (
                (*best_pairs(x, self.test_score_thresh, self.test_topk_candidates), b) for x, b in zip(scores, boxes)
            )
        ]
        found = kept[0].cat(kept)
        found.pred_boxes.clip(size)
        keep = batched_nms(found.pred_boxes.tensor, found.scores, found.pred_classes, self.test_nms_thresh)
        return found[keep[: self.max_detections_per_image]]


def best_pairs(scores: Tensor, threshold: float, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, cells and classes of the best pairs above a threshold, of scores (R, K)."""
    above = scores > threshold
    pairs, values = torch.nonzero(above), scores[above]
    count: Any = pairs.shape[0]  # a tensor while a model is traced
    count = count.clamp(max=number) if isinstance(count, Tensor) else min(count, number)
    best, order = values.topk(count)
    cells, classes = pairs[order].unbind(1)
    return best, cells, classes


def _boxes_of(objects: Instances, index: Tensor) -> Tensor:
    """Return the boxes (R, 4) of the objects with these indices; zeros where there are none."""
    boxes = objects.gt_boxes.tensor
    return boxes[index.clamp_min(0)] if len(boxes) else boxes.new_zeros(len(index), 4)


def _number(positive: Tensor) -> Tensor:
    """Return the number of positive cells, at least one for each image."""
    return positive.sum(1).clamp_min(1).sum()
