"""The config keys of our networks: for segmentation, with Detectron2's DeepLab among them, RepPoints, transformers."""

from __future__ import annotations

from detectron2.config import CfgNode, get_cfg
from detectron2.projects.deeplab import add_deeplab_config

from .reppoints.config import add_reppoints_config
from .transformers import add_transformer_config

__all__ = ["add_missing_keys", "add_segmentation_config"]


def add_missing_keys(target: CfgNode, source: CfgNode) -> None:
    """Copy to ``target`` each key of ``source`` that it lacks, with its value."""
    for key, value in source.items():
        if key not in target:
            target[key] = value.clone() if isinstance(value, CfgNode) else value
        elif isinstance(value, CfgNode):
            add_missing_keys(target[key], value)


def add_segmentation_config(cfg: CfgNode) -> None:
    """Add the keys of our networks, with their defaults, to a Detectron2 config.

    A key that is there already keeps its value. The call also registers and configures the backbone and the heads of
    Detectron2's DeepLab project, so that they can be student or teacher beside ours.
    """
    ours = get_cfg()
    add_deeplab_config(ours)

    ours.MODEL.MOBILENETV2 = CfgNode()
    # Multiplies every layer's channels, which are then rounded to multiples of 8.
    ours.MODEL.MOBILENETV2.WIDTH_MULT = 1.0
    # Some of "stem", "res2", "res3", "res4", "res5"; blocks behind the last of them are left out.
    ours.MODEL.MOBILENETV2.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # "FrozenBN", "BN", "SyncBN" or "naiveSyncBN". MODEL.BACKBONE.FREEZE_AT is the number of frozen stages.
    ours.MODEL.MOBILENETV2.NORM = "FrozenBN"
    # 32, 16 or 8. With 16 and 8, dilation takes the place of the last strides.
    ours.MODEL.MOBILENETV2.OUTPUT_STRIDE = 32

    # The feature of the auxiliary classifier that ASPPHead and PSPHead have in training; empty for none.
    ours.MODEL.SEM_SEG_HEAD.AUX_IN_FEATURE = ""
    ours.MODEL.SEM_SEG_HEAD.AUX_LOSS_WEIGHT = 0.4
    add_reppoints_config(ours)
    add_transformer_config(ours)
    add_missing_keys(cfg, ours)
