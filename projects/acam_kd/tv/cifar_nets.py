"""Small residual networks for images of 32 pixels, under their usual names.

``resnet20``, 32, 44, 56 and 110 are those of He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, with
16, 32 and 64 channels; a change of channels is a 1x1 convolution. ``resnet8`` and ``resnet14`` are the shorter ones of
the distillation literature. ``wrn_40_2``, say, is the wide network of depth 40 and width 2 of Zagoruyko & Komodakis,
"Wide Residual Networks", BMVC 2016, in the same order of layers.
"""

from __future__ import annotations

import re

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CIFAR_NETS", "CifarNet", "build_cifar_net"]

CIFAR_NETS = (
    *(f"resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 110)), "wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2"
)  # fmt: skip
"""The names."""
CHANNELS = (16, 32, 64)


class CifarNet(nn.Module):
    """Three stages of residual blocks at strides 1, 2 and 4, an average over positions, and one linear layer.

    Args:
        blocks: of each stage.
        width: factor of the channels.
        num_classes: K.
    """

    def __init__(self, blocks: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, CHANNELS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(CHANNELS[0])
        before = CHANNELS[0]
        for number, channels in enumerate(CHANNELS, 1):
            stage = [_Block(before, channels * width, 1 if number == 1 else 2)]
            stage += [_Block(channels * width, channels * width, 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*stage))
            before = channels * width
        self.fc = nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> logits (N, K)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))  # type: ignore[operator]
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """Two 3x3 convolutions around which the input is added."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or before != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.downsample(x))


def build_cifar_net(name: str, num_classes: int) -> CifarNet:
    """Build one of ``CIFAR_NETS``.

    Example:
        >>> sum(p.numel() for p in build_cifar_net("resnet20", 10).parameters())
        272474
    """
    wide = re.fullmatch(r"wrn_(\d+)_(\d+)", name)
    depth, width = (int(wide[1]) - 4, int(wide[2])) if wide else (int(name.removeprefix("resnet")) - 2, 1)
    return CifarNet(depth // 6, width, num_classes)
