"""RepPoints (Yang et al., ICCV 2019): importing this package registers its backbone and its meta-architecture."""

from .backbone import EvalBatchNorm, NormedP6P7, build_reppoints_resnet_fpn_backbone
from .config import add_reppoints_config
from .deform import DeformConv, deformable_conv
from .detector import RepPoints
from .head import RepPointsHead

__all__ = [
    "DeformConv",
    "EvalBatchNorm",
    "NormedP6P7",
    "RepPoints",
    "RepPointsHead",
    "add_reppoints_config",
    "build_reppoints_resnet_fpn_backbone",
    "deformable_conv",
]
