"""The config keys of the segmentation networks: Detectron2's own DeepLab project's, and those of ours."""

from __future__ import annotations

from detectron2.config import CfgNode, get_cfg
from detectron2.projects.deeplab import add_deeplab_config

__all__ = ["add_missing_keys", "add_segmentation_config"]


def add_missing_keys(target: CfgNode, source: CfgNode) -> None:
    """Copy what ``source`` has and ``target`` has not."""
    for key, value in source.items():
        if key not in target:
            target[key] = value.clone() if isinstance(value, CfgNode) else value
        elif isinstance(value, CfgNode):
            add_missing_keys(target[key], value)


def add_segmentation_config(cfg: CfgNode) -> None:
    """Add the keys, with their defaults, to a Detectron2 config; a key that is there already keeps its value.

    Detectron2's own DeepLab backbone and heads are registered and configured by this too, so that they can be
    student or teacher beside ours.
    """
    ours = get_cfg()
    add_deeplab_config(ours)

    ours.MODEL.MOBILENETV2 = CfgNode()
    # Multiplies every layer's channels, which are then rounded to multiples of 8.
    ours.MODEL.MOBILENETV2.WIDTH_MULT = 1.0
    # Of "stem", "res2", "res3", "res4", "res5"; blocks behind the last of them are left out.
    ours.MODEL.MOBILENETV2.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # "FrozenBN", "BN", "SyncBN" or "naiveSyncBN". How many stages are frozen: MODEL.BACKBONE.FREEZE_AT.
    ours.MODEL.MOBILENETV2.NORM = "FrozenBN"
    # 32, or 16 or 8, where dilation takes the place of the last strides.
    ours.MODEL.MOBILENETV2.OUTPUT_STRIDE = 32

    # The feature that ASPPHead and PSPHead put an auxiliary classifier on in training; empty for none.
    ours.MODEL.SEM_SEG_HEAD.AUX_IN_FEATURE = ""
    ours.MODEL.SEM_SEG_HEAD.AUX_LOSS_WEIGHT = 0.4
    add_missing_keys(cfg, ours)
