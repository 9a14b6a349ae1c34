"""The backbone of RepPoints: a ResNet, deformable or not, below an FPN whose every convolution is normalised."""

from __future__ import annotations

import fvcore.nn.weight_init as weight_init
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, FPN, ResNet
from detectron2.modeling.backbone.resnet import DeformBottleneckBlock, build_resnet_backbone
from torch import Tensor, nn

from ..neck import fpn_over
from .deform import DeformConv

__all__ = ["EvalBatchNorm", "NormedP6P7", "build_reppoints_resnet_fpn_backbone"]

EVAL_BN = "EvalBN"


class EvalBatchNorm(FrozenBatchNorm2d):
    """Batch normalisation by fixed statistics with a trained scale and shift, which the published models have.

    The names in its state are those of ``FrozenBatchNorm2d``, whose scale and shift are fixed too.

    Args:
        frozen: the normalisation whose values it takes over.
    """

    def __init__(self, frozen: FrozenBatchNorm2d) -> None:
        super().__init__(frozen.num_features, frozen.eps)
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(frozen, name)
            delattr(self, name)
            if name in ("weight", "bias"):
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)


class NormedP6P7(nn.Module):
    """Two more levels of an FPN on C5, each a convolution of stride 2 and a normalisation, without ReLU between them.

    Args:
        in_channels: of C5.
        out_channels: of the levels.
        norm: as of ``detectron2.layers.get_norm``; empty for a bias instead.
        in_feature: the backbone's name for C5.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: str = "GN", in_feature: str = "res5") -> None:
        super().__init__()
        self.num_levels, self.in_feature = 2, in_feature
        self.p6 = _normed(in_channels, out_channels, norm)
        self.p7 = _normed(out_channels, out_channels, norm)

    def forward(self, c5: Tensor) -> list[Tensor]:
        """Return P6 and P7."""
        p6 = self.p6(c5)
        return [p6, self.p7(p6)]


def _normed(in_channels: int, out_channels: int, norm: str) -> Conv2d:
    conv = Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=not norm, norm=get_norm(norm, out_channels))
    weight_init.c2_xavier_fill(conv)
    return conv


@BACKBONE_REGISTRY.register()
def build_reppoints_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a ResNet-FPN with the levels P3 to P7.

    The keys are Detectron2's own. Two of them mean more here:

    - MODEL.RESNETS.DEFORM_ON_PER_STAGE uses torchvision's operator, so that such a net trains on CPUs too.
    - MODEL.RESNETS.NORM may be "EvalBN": statistics are fixed, scale and shift are trained behind FREEZE_AT.

    Args:
        cfg: the config.
        input_shape: the shape of the images; only its channels are used.
    """
    fixed = cfg.MODEL.RESNETS.NORM == EVAL_BN
    if fixed:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.RESNETS.NORM = "FrozenBN"
    bottom_up = build_resnet_backbone(cfg, input_shape)
    _use_torchvision(bottom_up)
    if fixed:
        _train_affine(bottom_up)
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    top_block = NormedP6P7(bottom_up.output_shape()["res5"].channels, channels, cfg.MODEL.FPN.NORM)
    return fpn_over(cfg, bottom_up, top_block)


def _use_torchvision(resnet: ResNet) -> None:
    for block in resnet.modules():
        if isinstance(block, DeformBottleneckBlock):
            block.conv2 = DeformConv.like(block.conv2)


def _train_affine(resnet: ResNet) -> None:
    """Let the scales and shifts of all convolutions that are trained be trained too."""
    for conv in resnet.modules():
        trained = isinstance(conv, (Conv2d, DeformConv)) and conv.weight.requires_grad
        if trained and isinstance(conv.norm, FrozenBatchNorm2d):
            conv.norm = EvalBatchNorm(conv.norm)
