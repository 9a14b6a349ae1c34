"""Swin under an FPN and ViTDet's plain ViT under its pyramid, for YAML configs: the networks are Detectron2's own."""

from __future__ import annotations

from functools import partial

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, SimpleFeaturePyramid, SwinTransformer, ViT
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from ..core.errors import ConfigError
from .neck import fpn_over

__all__ = [
    "ViTPyramid",
    "add_transformer_config",
    "build_retinanet_swin_fpn_backbone",
    "build_retinanet_vitdet_backbone",
    "build_swin_fpn_backbone",
    "build_vitdet_backbone",
]

STAGES = ("p0", "p1", "p2", "p3")
"""Detectron2's names of Swin's four stages, of strides 4 to 32."""


def add_transformer_config(cfg: CfgNode) -> None:
    """Add the keys of Swin and of ViTDet's ViT, and of their optimizer, to a Detectron2 config."""
    # The defaults are Swin-T. MODEL.FPN.IN_FEATURES names the stages, some of p0 to p3; MODEL.BACKBONE.FREEZE_AT
    # is the number of frozen ones, the embedding of the patches included.
    swin = cfg.MODEL.SWIN = CfgNode()
    swin.EMBED_DIM = 96
    swin.DEPTHS = [2, 2, 6, 2]
    swin.NUM_HEADS = [3, 6, 12, 24]
    swin.WINDOW_SIZE = 7
    swin.DROP_PATH_RATE = 0.2
    # The defaults are ViTDet-B. MODEL.FPN.OUT_CHANNELS is the width of the pyramid.
    vit = cfg.MODEL.VIT = CfgNode()
    # The side of the images for which the relative positions are made; for others they are interpolated.
    vit.IMG_SIZE = 1024
    vit.PATCH_SIZE = 16
    vit.EMBED_DIM = 768
    vit.DEPTH = 12
    vit.NUM_HEADS = 12
    vit.DROP_PATH_RATE = 0.1
    # All blocks attend within windows of so many patches but those of GLOBAL_ATTENTION; 0 for none that does.
    vit.WINDOW_SIZE = 14
    vit.GLOBAL_ATTENTION = [2, 5, 8, 11]
    # Batches are padded to squares of this side; 0 pads to multiples of the coarsest stride, as an FPN does.
    vit.SQUARE_PAD = 1024
    # "SGD", which is Detectron2's, or "ADAMW", for transformers.
    cfg.SOLVER.OPTIMIZER = "SGD"


class ViTPyramid(SimpleFeaturePyramid):
    """The pyramid of ViTDet, whose batches are padded to multiples of its coarsest stride, too.

    Detectron2's own declares this under a misspelt key, so that without square padding its batches are not padded.
    """

    @property
    def size_divisibility(self) -> int:
        """The coarsest stride of a level that a convolution or a pooling of the ViT's map makes."""
        return int(self._size_divisibility)

    @property
    def padding_constraints(self) -> dict[str, int]:
        """The stride, and the side of a square or 0."""
        return {"size_divisibility": self.size_divisibility, "square_size": self._square_pad}


@BACKBONE_REGISTRY.register()
def build_swin_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a Swin Transformer under the FPN of Faster R-CNN, as Detectron2's ``build_resnet_fpn_backbone``."""
    return fpn_over(cfg, _swin(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_swin_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a Swin Transformer under the FPN of RetinaNet: P6 and P7 are made of the last stage."""
    bottom_up, last = _swin(cfg, input_shape), cfg.MODEL.FPN.IN_FEATURES[-1]
    channels = bottom_up.output_shape()[last].channels
    return fpn_over(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS, in_feature=last))


@BACKBONE_REGISTRY.register()
def build_vitdet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SimpleFeaturePyramid:
    """Build a plain ViT under ViTDet's pyramid, P2 to P6: the levels and names of Detectron2's ViTDet."""
    return _pyramid(cfg, input_shape, (4.0, 2.0, 1.0, 0.5), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_vitdet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SimpleFeaturePyramid:
    """Build a plain ViT under ViTDet's pyramid with the levels of RetinaNet: P6 and P7 are made of P5."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return _pyramid(cfg, input_shape, (2.0, 1.0, 0.5), LastLevelP6P7(channels, channels, in_feature="p5"))


def _swin(cfg: CfgNode, input_shape: ShapeSpec) -> SwinTransformer:
    node, stages = cfg.MODEL.SWIN, list(cfg.MODEL.FPN.IN_FEATURES)
    if not stages or not {*stages} <= {*STAGES}:
        raise ConfigError("MODEL.FPN.IN_FEATURES", stages, f"some of {', '.join(STAGES)}, the stages of Swin")
    if len(node.DEPTHS) != 4 or len(node.NUM_HEADS) != 4:
        raise ConfigError("MODEL.SWIN.DEPTHS", f"{node.DEPTHS} with heads {node.NUM_HEADS}", "four numbers of each")
    for stage, heads in enumerate(node.NUM_HEADS):
        if heads < 1 or node.EMBED_DIM * 2**stage % heads:
            channels = node.EMBED_DIM * 2**stage
            raise ConfigError("MODEL.SWIN.NUM_HEADS", node.NUM_HEADS, f"a divisor of {channels} for stage {stage}")
    return SwinTransformer(
        in_chans=input_shape.channels,
        embed_dim=node.EMBED_DIM,
        depths=node.DEPTHS,
        num_heads=node.NUM_HEADS,
        window_size=node.WINDOW_SIZE,
        drop_path_rate=node.DROP_PATH_RATE,
        out_indices=[STAGES.index(stage) for stage in stages],
        frozen_stages=cfg.MODEL.BACKBONE.FREEZE_AT or -1,
    )


def _pyramid(cfg: CfgNode, input_shape: ShapeSpec, factors: tuple[float, ...], top_block: nn.Module) -> ViTPyramid:
    node = cfg.MODEL.VIT
    if cfg.MODEL.BACKBONE.FREEZE_AT:
        raise ConfigError("MODEL.BACKBONE.FREEZE_AT", cfg.MODEL.BACKBONE.FREEZE_AT, "0: no part of a ViT is frozen")
    if node.EMBED_DIM % node.NUM_HEADS:
        raise ConfigError("MODEL.VIT.NUM_HEADS", node.NUM_HEADS, f"a divisor of MODEL.VIT.EMBED_DIM, {node.EMBED_DIM}")
    if wrong := [block for block in node.GLOBAL_ATTENTION if not 0 <= block < node.DEPTH]:
        raise ConfigError("MODEL.VIT.GLOBAL_ATTENTION", wrong[0], f"blocks among 0 to {node.DEPTH - 1}")
    net = ViT(
        img_size=node.IMG_SIZE,
        patch_size=node.PATCH_SIZE,
        in_chans=input_shape.channels,
        embed_dim=node.EMBED_DIM,
        depth=node.DEPTH,
        num_heads=node.NUM_HEADS,
        drop_path_rate=node.DROP_PATH_RATE,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=node.WINDOW_SIZE,
        window_block_indexes=[block for block in range(node.DEPTH) if block not in node.GLOBAL_ATTENTION],
    )
    return ViTPyramid(
        net=net,
        in_feature="last_feat",
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        scale_factors=factors,
        top_block=top_block,
        norm="LN",
        square_pad=node.SQUARE_PAD,
    )
