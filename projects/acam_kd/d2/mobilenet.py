"""MobileNetV2 (Sandler et al., CVPR 2018) as a Detectron2 backbone, which can be plain, dilated or under an FPN."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from detectron2.config import CfgNode, configurable
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn
from torchvision.models import MobileNetV2 as TorchvisionMobileNetV2

from ..core.errors import ConfigError
from .neck import fpn_over

__all__ = ["MobileNetV2"]

LAST_BLOCK = {"stem": 1, "res2": 3, "res3": 6, "res4": 13, "res5": 17}
"""The block that gives each output."""
STRIDED_BLOCKS = (2, 4, 7, 14)
"""The blocks with stride 2."""
NORMS = ("FrozenBN", "BN", "SyncBN", "naiveSyncBN")
OUTPUT_STRIDES = (32, 16, 8)


class MobileNetV2(Backbone):
    """torchvision's MobileNetV2 up to its 320 channels, with outputs named like those of Detectron2's ResNets.

    ========  ========  ======  =======
    output    block     stride  channels (at width 1)
    ========  ========  ======  =======
    stem       1         2       16
    res2       3         4       24
    res3       6         8       32
    res4      13        16       96
    res5      17        32      320
    ========  ========  ======  =======

    The parameters have torchvision's names, so its ImageNet file can be ``MODEL.WEIGHTS mobilenet_v2.pth``; see
    ``d2/trunk.py``. The 1x1 convolution to 1280 channels is left out.

    Args:
        width_mult: the factor of all channels, which are then rounded to multiples of 8.
        out_features: the names of the outputs. Blocks behind the last of them are left out, since parameters that no
            output needs would stop distributed training.
        norm: "FrozenBN", "BN", "SyncBN" or "naiveSyncBN". torchvision's blocks build a norm from a number of channels
            alone, and the groups of group norm do not divide 24 or 40 channels.
        output_stride: 32, 16 or 8. With 16 and 8, dilation takes the place of the last strides (see ``_dilate``).
        freeze_at: the number of frozen stages, as in Detectron2's ResNets: 0 freezes nothing, 1 the stem, 2 res2 too,
            and so on.

    Raises:
        ConfigError: an argument has another value.
    """

    @configurable
    def __init__(
        self,
        *,
        width_mult: float = 1.0,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        norm: str = "FrozenBN",
        output_stride: int = 32,
        freeze_at: int = 0,
    ) -> None:
        super().__init__()
        _check(width_mult, out_features, norm, output_stride)
        last = max(LAST_BLOCK[name] for name in out_features)
        made = TorchvisionMobileNetV2(num_classes=1, width_mult=width_mult, norm_layer=partial(get_norm, norm))
        self.features = made.features[: last + 1]
        strides = _dilate(self.features, output_stride)
        self._out_features = [name for name in LAST_BLOCK if name in out_features]
        self._out_feature_channels = {name: made.features[LAST_BLOCK[name]].out_channels for name in self._out_features}
        self._out_feature_strides = {name: strides[LAST_BLOCK[name]] for name in self._out_features}
        self._freeze(freeze_at)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, object]:
        """Return the arguments, from MODEL.MOBILENETV2 and MODEL.BACKBONE.FREEZE_AT."""
        if input_shape.channels != 3:
            raise ConfigError(
                "MODEL.PIXEL_MEAN",
                f"{list(cfg.MODEL.PIXEL_MEAN)}, which is {input_shape.channels} channels",
                allowed="3 channels, the images of MobileNetV2",
            )
        node = cfg.MODEL.MOBILENETV2
        return {
            "width_mult": node.WIDTH_MULT,
            "out_features": node.OUT_FEATURES,
            "norm": node.NORM,
            "output_stride": node.OUTPUT_STRIDE,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
        }

    @property
    def padding_constraints(self) -> dict[str, int]:
        """The stride of the coarsest output as size divisibility, see ``Backbone.padding_constraints``.

        Logits that are scaled up by this stride then cover the image exactly.
        """
        return {"size_divisibility": max(self._out_feature_strides.values())}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the outputs, by name, of images (N, 3, H, W)."""
        names = {LAST_BLOCK[name]: name for name in self._out_features}
        outputs = {}
        for index, block in enumerate(self.features):
            x = block(x)
            if index in names:
                outputs[names[index]] = x
        return outputs

    def _freeze(self, freeze_at: int) -> None:
        """Freeze the parameters and the batch norms of the first stages; a frozen norm stays as it is."""
        frozen = [block for _, block in list(LAST_BLOCK.items())[: max(freeze_at, 0)]]
        for block in self.features[: max(frozen, default=-1) + 1]:
            block.requires_grad_(False)
            FrozenBatchNorm2d.convert_frozen_batchnorm(block)


def _check(width_mult: float, out_features: Sequence[str], norm: str, output_stride: int) -> None:
    """Raise ConfigError for an argument of ``MobileNetV2`` that cannot be built."""
    node = "MODEL.MOBILENETV2"
    if not width_mult > 0:
        raise ConfigError(f"{node}.WIDTH_MULT", width_mult, allowed="> 0")
    if not out_features or not set(out_features) <= set(LAST_BLOCK):
        raise ConfigError(f"{node}.OUT_FEATURES", list(out_features), allowed=f"some of {', '.join(LAST_BLOCK)}")
    if norm not in NORMS:
        raise ConfigError(f"{node}.NORM", norm, allowed=f"one of {', '.join(NORMS)}")
    if output_stride not in OUTPUT_STRIDES:
        raise ConfigError(
            f"{node}.OUTPUT_STRIDE", output_stride, allowed=f"one of {', '.join(map(str, OUTPUT_STRIDES))}"
        )


def _dilate(blocks: nn.Sequential, output_stride: int) -> list[int]:
    """Replace strides beyond ``output_stride`` by dilation, in the 3x3 depthwise convolutions.

    A convolution that loses its stride keeps the dilation reached before it. All later ones have twice as much. So
    every kernel touches the same pixels as in the strided net, and the map is the strided one with the cells between
    filled in. CIRKD and MasKD follow this rule for Cityscapes; it is DeepLab's (Chen et al., 2017).

    Names, shapes and residual connections are unchanged. A former stride-2 block still has no residual connection.

    Returns:
        The stride of each block's output with respect to the image.
    """
    stride, dilation, strides = 2, 1, [2]
    for index, block in enumerate(list(blocks)[1:], start=1):
        depthwise = next(m for m in block.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3))
        depthwise.dilation = depthwise.padding = (dilation, dilation)
        if index in STRIDED_BLOCKS and stride == output_stride:
            depthwise.stride = (1, 1)
            dilation *= 2
        elif index in STRIDED_BLOCKS:
            stride *= 2
        strides.append(stride)
    return strides


@BACKBONE_REGISTRY.register()
def build_mobilenetv2_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> MobileNetV2:
    """Build MobileNetV2 alone, for a segmentation head."""
    return MobileNetV2(cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_mobilenetv2_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build MobileNetV2 under the FPN of Faster R-CNN, as Detectron2's ``build_resnet_fpn_backbone``."""
    return fpn_over(cfg, MobileNetV2(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_mobilenetv2_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build MobileNetV2 under the FPN of RetinaNet, as Detectron2's ``build_retinanet_resnet_fpn_backbone``."""
    bottom_up = MobileNetV2(cfg, input_shape)
    channels = bottom_up.output_shape()["res5"].channels
    return fpn_over(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS))
