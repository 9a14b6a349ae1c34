"""The config keys of RepPoints."""

from __future__ import annotations

from detectron2.config import CfgNode

from ...core.errors import ConfigError
from .points import TRANSFORMS

__all__ = ["add_reppoints_config", "check_reppoints_config"]


def add_reppoints_config(cfg: CfgNode) -> None:
    """Add the keys of RepPoints, with the values of its published COCO models, to a Detectron2 config."""
    node = cfg.MODEL.REPPOINTS = CfgNode()
    node.NUM_CLASSES = 80
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Convolutions of each tower, and the channels of the whole head.
    node.NUM_CONVS = 3
    node.CONVS_DIM = 256
    # "GN", of 32 groups, or "" for none, in the head. MODEL.FPN.NORM is the neck's.
    node.NORM = "GN"
    # The box of a set of points: "moment", "minmax", or "partial_minmax", of the first four points.
    node.TRANSFORM = "moment"
    # Factors of two gradients: that of the first points through the sampling offsets, and that of the learnt scale of
    # the moment transform.
    node.GRADIENT_MUL = 0.1
    node.MOMENT_MUL = 0.01
    node.PRIOR_PROB = 0.01
    # An object of 4 strides is of the size of a level; each of them gets so many points in the first stage.
    node.POINT_SCALE = 4
    node.POINTS_PER_OBJECT = 1
    # IoU of a first box below which a point is background, and from which on it is an object.
    node.IOU_THRESHOLDS = [0.4, 0.5]
    # The published code gives an object that overlaps no first box every point of its image, and takes them from the
    # others. True repeats this.
    node.MATCH_WITHOUT_OVERLAP = False
    node.FOCAL_LOSS_ALPHA = 0.25
    node.FOCAL_LOSS_GAMMA = 2.0
    node.SMOOTH_L1_LOSS_BETA = 0.11
    node.INIT_LOSS_WEIGHT = 0.5
    node.REFINE_LOSS_WEIGHT = 1.0
    node.SCORE_THRESH_TEST = 0.05
    node.TOPK_CANDIDATES_TEST = 1000
    node.NMS_THRESH_TEST = 0.5


def check_reppoints_config(node: CfgNode) -> None:
    """Check the values of MODEL.REPPOINTS.

    Raises:
        ConfigError: one of them cannot be built.
    """
    low, high = node.IOU_THRESHOLDS if len(node.IOU_THRESHOLDS) == 2 else (1, 0)
    rules = [
        ("NUM_CLASSES", node.NUM_CLASSES >= 1, ">= 1"),
        ("IN_FEATURES", len(node.IN_FEATURES) >= 1, "one level or more"),
        ("NORM", node.NORM in ("GN", ""), "GN, or nothing"),
        ("CONVS_DIM", node.CONVS_DIM >= 1, ">= 1"),
        ("CONVS_DIM", node.NORM != "GN" or node.CONVS_DIM % 32 == 0, "a multiple of 32 with NORM GN"),
        ("TRANSFORM", node.TRANSFORM in TRANSFORMS, f"one of {', '.join(TRANSFORMS)}"),
        ("POINT_SCALE", node.POINT_SCALE > 0, "> 0"),
        ("POINTS_PER_OBJECT", node.POINTS_PER_OBJECT >= 1, ">= 1"),
        ("IOU_THRESHOLDS", 0 <= low <= high <= 1, "two of 0 to 1, the lower one first"),
        ("SMOOTH_L1_LOSS_BETA", node.SMOOTH_L1_LOSS_BETA > 0, "> 0"),
    ]
    for key, holds, allowed in rules:
        if not holds:
            raise ConfigError(f"MODEL.REPPOINTS.{key}", node[key], allowed)
