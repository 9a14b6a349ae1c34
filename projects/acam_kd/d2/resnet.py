"""Dilated ResNets of every depth for segmentation, made of Detectron2's own blocks and with its names."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from detectron2.projects.deeplab.resnet import DeepLabStem

from ..core.errors import ConfigError

__all__ = ["DilatedBasicBlock", "DilatedResNet", "build_dilated_resnet_backbone"]

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
DILATIONS = ((1, 1), (1, 2), (2, 4))
STEMS = {"basic": BasicStem, "deeplab": DeepLabStem}


class DilatedBasicBlock(BasicBlock):
    """Detectron2's BasicBlock with a dilation for each of its two convolutions.

    BasicBlock itself has no dilation. Names and parameters are unchanged, so checkpoints of the plain block fit.

    Args:
        in_channels, out_channels, stride, norm: the arguments of BasicBlock.
        dilation: the dilations of the first and of the second convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, norm: str = "BN", dilation: tuple[int, int]
    ) -> None:
        super().__init__(in_channels, out_channels, stride=stride, norm=norm)
        for conv, rate in zip((self.conv1, self.conv2), dilation):
            conv.dilation = conv.padding = (rate, rate)


class DilatedResNet(ResNet):
    """Detectron2's ResNet with images that are padded to whole cells of its coarsest output.

    Logits that are scaled up by the stride of that output then cover the image exactly.
    """

    @property
    def padding_constraints(self) -> dict[str, int]:
        """The stride of the coarsest output as size divisibility, see ``Backbone.padding_constraints``."""
        return {"size_divisibility": max(self._out_feature_strides[name] for name in self._out_features)}


@BACKBONE_REGISTRY.register()
def build_dilated_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> DilatedResNet:
    """Build a ResNet of depth 18, 34, 50, 101 or 152 with output stride 32, 16 or 8, as CIRKD and MasKD use them.

    The keys are those of MODEL.RESNETS and of Detectron2's DeepLab project:

    - RES4_DILATION and RES5_DILATION are 1 and 1 (stride 32), 1 and 2 (stride 16) or 2 and 4 (stride 8).
    - STEM_TYPE is "basic", or "deeplab" for three 3x3 convolutions. With "deeplab" the literature has
      STEM_OUT_CHANNELS 128.
    - RES2_OUT_CHANNELS is 64 for depths 18 and 34, and 256 for the others. Any other value makes a net of another
      width.
    - STRIDE_IN_1X1 is False in the literature.

    In a stage without its former stride, the convolution that had it keeps the dilation reached before. All later
    convolutions have the stage's dilation. So every kernel touches the same pixels as in the strided net, and the map
    is the strided one with the cells between filled in.

    ``build_resnet_deeplab_backbone`` of Detectron2 differs. It has no depths 18 and 34, dilates the first block in
    full, and multiplies the dilations of res5 by RES5_MULTI_GRID. That key has no effect here.

    Args:
        cfg: the config, after ``add_segmentation_config``.
        input_shape: the shape of the images; only its channels are used.

    Raises:
        ConfigError: a key has a value that cannot be built.
    """
    node = cfg.MODEL.RESNETS
    _check(node)
    stem = STEMS[node.STEM_TYPE](in_channels=input_shape.channels, out_channels=node.STEM_OUT_CHANNELS, norm=node.NORM)
    dilations = (1, 1, node.RES4_DILATION, node.RES5_DILATION)
    in_channels, before, stages = node.STEM_OUT_CHANNELS, 1, []
    for index, dilation in enumerate(dilations):
        stages.append(_stage(node, index, in_channels, before, dilation))
        in_channels, before = node.RES2_OUT_CHANNELS * 2**index, dilation
    return DilatedResNet(stem, stages, out_features=node.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)


def _stage(node: CfgNode, index: int, in_channels: int, before: int, dilation: int) -> list[CNNBlockBase]:
    """Build the blocks of stage ``res{index + 2}``, behind a stage whose dilation is ``before``."""
    number = BLOCKS[node.DEPTH][index]
    kind: dict[str, Any]
    if node.DEPTH < 50:
        kind = {"block_class": DilatedBasicBlock}
        kind["dilation_per_block"] = [(before, dilation)] + [(dilation, dilation)] * (number - 1)
    else:
        kind = {"block_class": BottleneckBlock, "num_groups": node.NUM_GROUPS, "stride_in_1x1": node.STRIDE_IN_1X1}
        kind["bottleneck_channels"] = node.NUM_GROUPS * node.WIDTH_PER_GROUP * 2**index
        # A stride in the first 1x1 comes before the block's 3x3, which then has the dilation of the stage.
        kind["dilation_per_block"] = [dilation if node.STRIDE_IN_1X1 else before] + [dilation] * (number - 1)
    return ResNet.make_stage(
        num_blocks=number,
        stride_per_block=[2 if index > 0 and dilation == before else 1] + [1] * (number - 1),
        in_channels=in_channels,
        out_channels=node.RES2_OUT_CHANNELS * 2**index,
        norm=node.NORM,
        **kind,
    )


def _check(node: CfgNode) -> None:
    """Raise ConfigError for a value of MODEL.RESNETS that cannot be built."""
    key = "MODEL.RESNETS"
    if node.DEPTH not in BLOCKS:
        raise ConfigError(f"{key}.DEPTH", node.DEPTH, allowed=f"one of {', '.join(map(str, BLOCKS))}")
    if node.STEM_TYPE not in STEMS:
        raise ConfigError(f"{key}.STEM_TYPE", node.STEM_TYPE, allowed=f"one of {', '.join(STEMS)}")
    if (node.RES4_DILATION, node.RES5_DILATION) not in DILATIONS:
        raise ConfigError(
            f"{key}.RES4_DILATION",
            f"{node.RES4_DILATION} with {key}.RES5_DILATION {node.RES5_DILATION}",
            allowed="1 with 1 (output stride 32), 1 with 2 (16) or 2 with 4 (8)",
        )
    names = ("stem", "res2", "res3", "res4", "res5")
    if not node.OUT_FEATURES or not set(node.OUT_FEATURES) <= set(names):
        raise ConfigError(f"{key}.OUT_FEATURES", node.OUT_FEATURES, allowed=f"some of {', '.join(names)}")
    if any(node.DEFORM_ON_PER_STAGE):
        raise ConfigError(
            f"{key}.DEFORM_ON_PER_STAGE",
            node.DEFORM_ON_PER_STAGE,
            allowed="False for every stage of build_dilated_resnet_backbone",
        )
    if node.DEPTH < 50 and node.NUM_GROUPS != 1:
        raise ConfigError(f"{key}.NUM_GROUPS", node.NUM_GROUPS, allowed=f"1 for depth {node.DEPTH}")
