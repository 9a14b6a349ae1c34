"""The file of a torchvision or timm classifier as MODEL.WEIGHTS: its trunk, into a ResNet or MobileNetV2."""

from __future__ import annotations

import logging
import os
import re
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import nn

from ..core.errors import ConfigError
from ..core.trunk_weights import load_trunk
from ..core.weights import read_state_dict
from ..files import sha256
from .mobilenet import MobileNetV2

__all__ = ["load_classifier"]

KEY = "MODEL.WEIGHTS"
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""The statistics of torchvision's classifiers, RGB, of pixels up to 255."""
FOREIGN = (".pkl", ".pyth")
"""The files that Detectron2 itself turns into its own."""

logger = logging.getLogger("detectron2.acam_kd.trunk")


def load_classifier(model: nn.Module, cfg: CfgNode) -> bool:
    """Load MODEL.WEIGHTS into the model's trunk if it is the file of a classifier.

    It is one if it is a local file of torch's or safetensors', none of whose names is one of the model's. All of the
    trunk's tensors are loaded or none. With INPUT.FORMAT BGR the first convolution is turned: such files take RGB.

    Args:
        model: the student.
        cfg: its config.

    Returns:
        False, and nothing is loaded, if MODEL.WEIGHTS is left to Detectron2.

    Raises:
        ConfigError: the file cannot be read, or does not fit, or the trunk is built otherwise.
    """
    path, trunk = cfg.MODEL.WEIGHTS, _trunk(model)
    if trunk is None or not os.path.isfile(path) or path.endswith(FOREIGN):
        return False
    names = {name.removeprefix("module.") for name in read_state_dict(path, argument=KEY)}
    if names & {*model.state_dict()}:
        return False
    _check(trunk, cfg)
    renamed = {name: _torchvision(name) for name in trunk.state_dict()} if isinstance(trunk, ResNet) else None
    order = "BGR" if cfg.INPUT.FORMAT == "BGR" else "RGB"
    found = load_trunk(trunk, path, argument=KEY, order=order, renamed=renamed)
    turned = "; its first convolution was turned from RGB to BGR" if order == "BGR" else ""
    logger.info("trunk loaded: %s, from %s (sha256 %s)%s", found, path, sha256(path), turned)
    _report_pixels(cfg)
    return True


def _trunk(model: nn.Module) -> nn.Module | None:
    """Return a model's ResNet or MobileNetV2; None if it has another trunk, which Detectron2 loads."""
    backbone: Any = getattr(model, "backbone", None)
    trunk = getattr(backbone, "bottom_up", backbone)
    return trunk if isinstance(trunk, (ResNet, MobileNetV2)) else None


def _torchvision(name: str) -> str:
    """Return torchvision's and timm's name of a tensor of Detectron2's ResNet.

    Example:
        >>> _torchvision("stem.conv1.norm.bias"), _torchvision("res2.0.shortcut.weight")
        ('bn1.bias', 'layer1.0.downsample.0.weight')
    """
    name = re.sub(r"^res(\d)", lambda found: f"layer{int(found[1]) - 1}", name.removeprefix("stem."))
    name = name.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
    return re.sub(r"conv(\d)\.norm\.", r"bn\1.", name)


def _check(trunk: nn.Module, cfg: CfgNode) -> None:
    """Raise ConfigError for a trunk whose tensors have a classifier's shapes and another meaning."""
    if not any(name.endswith("running_mean") for name in trunk.state_dict()):
        raise ConfigError(
            "MODEL.RESNETS.NORM", cfg.MODEL.RESNETS.NORM, "FrozenBN, BN or SyncBN", f"{KEY} has batch normalisation"
        )
    for block in trunk.modules():
        if isinstance(block, BottleneckBlock) and block.conv1.stride != (1, 1):
            raise ConfigError(
                "MODEL.RESNETS.STRIDE_IN_1X1", True, f"False, as in the network of {KEY}",
                "torchvision and timm have the stride in the 3x3 convolution",
            )  # fmt: skip


def _report_pixels(cfg: CfgNode) -> None:
    """Log the pixel statistics, with a warning if they cannot be those of a torchvision classifier."""
    step = -1 if cfg.INPUT.FORMAT == "BGR" else 1
    mean, std = list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD)
    same = all(
        abs(value - other) < 0.5
        for values, others in ((mean[::step], MEAN), (std[::step], STD))
        for value, other in zip(values, others)
    )
    logger.log(
        logging.INFO if same else logging.WARNING,
        "pixels: MODEL.PIXEL_MEAN %s, MODEL.PIXEL_STD %s, INPUT.FORMAT %s%s", mean, std, cfg.INPUT.FORMAT,
        "" if same else f"; torchvision's classifiers have {list(MEAN[::step])} and {list(STD[::step])}",
    )  # fmt: skip
