"""The head of RepPoints: two towers, points in two stages, and classes sampled at the first points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .deform import DeformConv
from .points import minmax_box, moment_box, partial_minmax_box

__all__ = ["RepPointsHead"]

KERNEL = tuple(float(d) for y in (-1, 0, 1) for x in (-1, 0, 1) for d in (y, x))
"""The taps of a 3x3 kernel, row by row, y before x."""


class RepPointsHead(nn.Module):
    """Predicts classes and two sets of nine points for every cell; it is shared by all levels.

    The first set comes from the points' tower alone. Deformable convolutions then sample both towers exactly at these
    points: for the classes, and for the differences from the first set to the second. Gradients through the sampling
    positions are scaled down, and the second set is detached from the first.

    Args:
        in_channels: of the levels.
        num_classes: K.
        channels: of the whole head.
        num_convs: convolutions of each tower.
        norm: of the towers, as of ``detectron2.layers.get_norm``; empty for none, and biases instead.
        transform: one of ``TRANSFORMS``, from points to boxes.
        gradient_mul: factor of the gradient to the first points through the sampling positions.
        moment_mul: factor of the gradient to the scale of the moment transform.
        prior_prob: of each class at the start.
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        channels: int = 256,
        num_convs: int = 3,
        norm: Any = "GN",
        transform: str = "moment",
        gradient_mul: float = 0.1,
        moment_mul: float = 0.01,
        prior_prob: float = 0.01,
    ) -> None:
        super().__init__()
        self.transform, self.gradient_mul, self.moment_mul = transform, gradient_mul, moment_mul
        if transform == "moment":
            self.moment_transfer = nn.Parameter(torch.zeros(2))
        self.cls_subnet = _tower(in_channels, channels, num_convs, norm)
        self.points_subnet = _tower(in_channels, channels, num_convs, norm)
        width = channels if num_convs else in_channels
        self.cls_dcn = DeformConv(width, channels)
        self.cls_score = nn.Conv2d(channels, num_classes, 1)
        self.init_conv = nn.Conv2d(width, channels, 3, padding=1)
        self.init_points = nn.Conv2d(channels, len(KERNEL), 1)
        self.refine_dcn = DeformConv(width, channels)
        self.refine_points = nn.Conv2d(channels, len(KERNEL), 1)
        self.kernel: Tensor
        self.register_buffer("kernel", torch.tensor(KERNEL).view(1, -1, 1, 1), persistent=False)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.constant_(self.cls_score.bias, -math.log((1 - prior_prob) / prior_prob))  # type: ignore[arg-type]

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Sequence[ShapeSpec]) -> dict[str, Any]:
        """Return the arguments that a config stands for."""
        node = cfg.MODEL.REPPOINTS
        return {
            "in_channels": input_shape[0].channels,
            "num_classes": node.NUM_CLASSES,
            "channels": node.CONVS_DIM,
            "num_convs": node.NUM_CONVS,
            "norm": node.NORM,
            "transform": node.TRANSFORM,
            "gradient_mul": node.GRADIENT_MUL,
            "moment_mul": node.MOMENT_MUL,
            "prior_prob": node.PRIOR_PROB,
        }

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Predict for every level.

        Args:
            features: (N, C, H, W) of each level.

        Returns:
            Logits (N, K, H, W), first and second points (N, 18, H, W), of each level. See ``points.py`` for the
            layout of points.
        """
        logits, first, second = zip(*(self._level(x) for x in features))
        return [*logits], [*first], [*second]

    def _level(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        of_classes, of_points = self.cls_subnet(x), self.points_subnet(x)
        init = self.init_points(F.relu(self.init_conv(of_points))).float()
        held = init.detach()
        slowed = (1 - self.gradient_mul) * held + self.gradient_mul * init
        offset = slowed - self.kernel
        logits = self.cls_score(F.relu(self.cls_dcn(of_classes, offset)))
        refine = self.refine_points(F.relu(self.refine_dcn(of_points, offset))).float() + held
        return logits, init, refine

    def boxes(self, points: Tensor) -> Tensor:
        """Return the boxes of sets of points, (N, 18, H, W) -> (N, 4, H, W), in cells from the cell's corner."""
        if self.transform == "moment":
            transfer = self.moment_transfer.to(points.dtype)
            return moment_box(points, self.moment_mul * transfer + (1 - self.moment_mul) * transfer.detach())
        return minmax_box(points) if self.transform == "minmax" else partial_minmax_box(points)


def _tower(in_channels: int, channels: int, number: int, norm: Any) -> nn.Sequential:
    layers = []
    for _ in range(number):
        normed = get_norm(norm, channels)
        layers.append(Conv2d(in_channels, channels, 3, padding=1, bias=normed is None, norm=normed, activation=F.relu))
        in_channels = channels
    return nn.Sequential(*layers)
