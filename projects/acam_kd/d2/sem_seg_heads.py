"""The heads of DeepLabV3 and PSPNet for ``SemanticSegmentor``, as the distillation literature builds them.

Detectron2 has a DeepLabV3 head of its own, with another pooling branch, dropout and loss. The heads here are those of
the published results on Cityscapes (CIRKD, MasKD and the methods that they compare with).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from detectron2.utils import comm
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn

from ..core.errors import ConfigError

__all__ = ["ASPPHead", "ContextHead", "PSPHead", "segmentation_loss"]

BINS = (1, 2, 3, 6)
NODE = "MODEL.SEM_SEG_HEAD"


def segmentation_loss(logits: Tensor, targets: Tensor, ignore_value: int) -> Tensor:
    """Compute the mean cross-entropy over the pixels that count, in float32.

    Args:
        logits: (N, K, h, w); they are scaled up to the labels bilinearly, with aligned corners.
        targets: labels (N, H, W), int64.
        ignore_value: the label of pixels that do not count.

    Returns:
        0-d. If no pixel counts, it is 0 with a graph, not NaN.
    """
    logits = F.interpolate(logits.float(), size=targets.shape[-2:], mode="bilinear", align_corners=True)
    total = F.cross_entropy(logits, targets, ignore_index=ignore_value, reduction="sum")
    return total / (targets != ignore_value).sum().clamp(min=1)


class ContextHead(nn.Module):
    """The base of the two heads: context, one 3x3 convolution, the predictor, and an auxiliary classifier.

    ``predictor`` is the 1x1 convolution whose outputs are the logits, before any scaling.

    Args:
        input_shape: the shapes of the backbone's outputs, by name.
        in_features: the name of the one feature that the head reads.
        context: a module of that feature; its output has ``context_channels`` channels.
        context_channels: see ``context``.
        num_classes: K.
        conv_dims: channels of the 3x3 convolution.
        norm: a norm of Detectron2's ``get_norm``.
        ignore_value: the label of pixels that do not count.
        loss_weight: the weight of the whole loss.
        aux_in_feature: the feature of the auxiliary classifier; empty for none. The classifier is a 3x3 convolution to
            a quarter of the channels and a predictor. Only training computes it.
        aux_loss_weight: the weight of its loss, multiplied by ``loss_weight``.

    Raises:
        ConfigError: the backbone does not give a feature, or not exactly one is named.
    """

    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        in_features: Sequence[str],
        context: nn.Module,
        context_channels: int,
        num_classes: int,
        conv_dims: int,
        norm: str,
        ignore_value: int = 255,
        loss_weight: float = 1.0,
        aux_in_feature: str = "",
        aux_loss_weight: float = 0.4,
    ) -> None:
        super().__init__()
        self.in_features, self.num_classes, self.ignore_value = list(in_features), num_classes, ignore_value
        self.common_stride = input_shape[self.in_features[0]].stride
        self.loss_weight, self.aux_in_feature, self.aux_loss_weight = loss_weight, aux_in_feature, aux_loss_weight
        self.context = context
        self.fuse = _conv(context_channels, conv_dims, 3, norm)
        self.dropout = nn.Dropout(0.1)
        self.predictor = _predictor(conv_dims, num_classes)
        self.auxiliary = None
        if aux_in_feature:
            channels = _channels(input_shape, [aux_in_feature], "AUX_IN_FEATURE")
            reduced = _conv(channels, channels // 4, 3, norm)
            self.auxiliary = nn.Sequential(reduced, nn.Dropout(0.1), _predictor(channels // 4, num_classes))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Return the arguments that the heads share."""
        node = cfg.MODEL.SEM_SEG_HEAD
        return {
            "input_shape": input_shape,
            "in_features": node.IN_FEATURES,
            "num_classes": node.NUM_CLASSES,
            "conv_dims": node.CONVS_DIM,
            "norm": node.NORM,
            "ignore_value": node.IGNORE_VALUE,
            "loss_weight": node.LOSS_WEIGHT,
            "aux_in_feature": node.AUX_IN_FEATURE,
            "aux_loss_weight": node.AUX_LOSS_WEIGHT,
        }

    def forward(
        self, features: Mapping[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Compute the losses or the logits, with the signature of Detectron2's heads.

        Args:
            features: the backbone's outputs, each (N, C, H / stride, W / stride).
            targets: labels (N, H, W), in training.

        Returns:
            In training None and the losses; else the logits (N, K, H, W) and an empty dict.

        Raises:
            ConfigError: training has no labels, or a single image (see ``_pooled``).
        """
        logits = self.layers(features)
        if self.training:
            return None, self.losses(logits, features, targets)
        return F.interpolate(logits, scale_factor=self.common_stride, mode="bilinear", align_corners=True), {}

    def layers(self, features: Mapping[str, Tensor]) -> Tensor:
        """Compute the logits (N, K, h, w) at the feature's own size."""
        return self.predictor(self.dropout(self.fuse(self.context(features[self.in_features[0]]))))

    def losses(self, logits: Tensor, features: Mapping[str, Tensor], targets: Tensor | None) -> dict[str, Tensor]:
        """Compute the loss of the logits, and the auxiliary classifier's own loss if there is one.

        Raises:
            ConfigError: there are no labels.
        """
        if targets is None:
            allowed = "labels of semantic segmentation, which training needs"
            raise ConfigError("DATASETS.TRAIN", "inputs without sem_seg", allowed=allowed)
        losses = {"loss_sem_seg": self.loss_weight * segmentation_loss(logits, targets, self.ignore_value)}
        if self.auxiliary is not None:
            loss = segmentation_loss(self.auxiliary(features[self.aux_in_feature]), targets, self.ignore_value)
            losses["loss_sem_seg_aux"] = self.loss_weight * self.aux_loss_weight * loss
        return losses


@SEM_SEG_HEADS_REGISTRY.register()
class ASPPHead(ContextHead):
    """DeepLabV3 (Chen et al., 2017): atrous spatial pyramid pooling.

    Args:
        input_shape, in_features, conv_dims, norm: see ``ContextHead``; all branches have ``conv_dims`` channels.
        dilations: the dilations of the three 3x3 branches: 12, 24 and 36 for features of stride 8, or 6, 12 and 18
            for stride 16.
        common: the other arguments of ``ContextHead``.

    Raises:
        ConfigError: there are not three dilations, or see ``ContextHead``.
    """

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        in_features: Sequence[str],
        conv_dims: int,
        norm: str,
        dilations: Sequence[int],
        **common: Any,
    ) -> None:
        context = _ASPP(_channels(input_shape, in_features), conv_dims, norm, dilations)
        common |= {"context": context, "context_channels": conv_dims, "conv_dims": conv_dims, "norm": norm}
        super().__init__(input_shape, in_features=in_features, **common)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Return the arguments, from MODEL.SEM_SEG_HEAD."""
        return super().from_config(cfg, input_shape) | {"dilations": cfg.MODEL.SEM_SEG_HEAD.ASPP_DILATIONS}


@SEM_SEG_HEADS_REGISTRY.register()
class PSPHead(ContextHead):
    """PSPNet (Zhao et al., CVPR 2017): a pyramid of pooled means beside the feature itself.

    Args:
        input_shape, in_features, norm: see ``ContextHead``.
        common: the other arguments of ``ContextHead``.
    """

    @configurable
    def __init__(
        self, input_shape: Mapping[str, ShapeSpec], *, in_features: Sequence[str], norm: str, **common: Any
    ) -> None:
        channels = _channels(input_shape, in_features)
        common |= {"context": _PyramidPooling(channels, norm), "norm": norm}
        common["context_channels"] = channels + len(BINS) * (channels // 4)
        super().__init__(input_shape, in_features=in_features, **common)


class _ASPP(nn.Module):
    """A 1x1 branch, three dilated 3x3 branches and the mean of the image, concatenated and projected."""

    def __init__(self, in_channels: int, out_channels: int, norm: str, dilations: Sequence[int]) -> None:
        super().__init__()
        if len(dilations) != 3:
            raise ConfigError(f"{NODE}.ASPP_DILATIONS", list(dilations), allowed="three numbers")
        branches = [_conv(in_channels, out_channels, 1, norm)]
        branches += [_conv(in_channels, out_channels, 3, norm, dilation) for dilation in dilations]
        self.branches = nn.ModuleList(branches)
        self.pool = _conv(in_channels, out_channels, 1, norm)
        self.project = _conv(5 * out_channels, out_channels, 1, norm)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        branches = [branch(x) for branch in self.branches]
        branches.append(_pooled(self.pool, x, 1))
        return self.dropout(self.project(torch.cat(branches, dim=1)))


class _PyramidPooling(nn.Module):
    """The feature together with its means over 1, 4, 9 and 36 parts of the image."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.branches = nn.ModuleList(_conv(channels, channels // 4, 1, norm) for _ in BINS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, *(_pooled(conv, x, size) for conv, size in zip(self.branches, BINS))], dim=1)


def _pooled(conv: nn.Module, x: Tensor, bins: int) -> Tensor:
    """Apply ``conv`` to the means over ``bins`` x ``bins`` parts of ``x``, and scale the result up to its size.

    Raises:
        ConfigError: batch norm in training has a single value per channel, which has no variance.
    """
    norm = conv.norm
    synchronised = type(norm) is not nn.BatchNorm2d and comm.get_world_size() > 1
    single = bins == 1 and x.shape[0] == 1 and isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training
    if single and not synchronised:
        raise ConfigError(
            "SOLVER.IMS_PER_BATCH",
            "1 image per process",
            allowed="at least 2 images per process, for batch norm behind global pooling",
            hint=f"raise it, or set {NODE}.NORM to GN or FrozenBN, or to SyncBN with several processes",
        )
    means = _means(x, bins) if bins > 1 and torch.jit.is_tracing() else F.adaptive_avg_pool2d(x, bins)  # type: ignore[attr-defined,no-untyped-call]
    return F.interpolate(conv(means), size=x.shape[-2:], mode="bilinear", align_corners=True)


def _means(x: Tensor, bins: int) -> Tensor:
    """Compute the adaptive means as products of matrices, since ONNX has no adaptive pooling of any size."""
    weights = []
    for size in x.shape[-2:]:
        part, cell = torch.arange(bins, device=x.device)[:, None], torch.arange(size, device=x.device)
        inside = ((cell >= part * size // bins) & (cell < ((part + 1) * size + bins - 1) // bins)).to(x.dtype)
        weights.append(inside / inside.sum(1, keepdim=True))
    return weights[0] @ x @ weights[1].T


def _channels(input_shape: Mapping[str, ShapeSpec], names: Sequence[str], key: str = "IN_FEATURES") -> int:
    """Return the number of channels of the one named feature.

    Raises:
        ConfigError: not exactly one feature is named, or the backbone does not give it.
    """
    if len(names) != 1 or names[0] not in input_shape:
        raise ConfigError(f"{NODE}.{key}", ", ".join(names), allowed=f"one of {', '.join(input_shape)}")
    return input_shape[names[0]].channels


def _conv(in_channels: int, out_channels: int, kernel: int, norm: str, dilation: int = 1) -> Conv2d:
    """Build a size-preserving convolution, a norm and a ReLU; weights are from N(0, 2 / (kernel^2 out_channels))."""
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel,
        padding=dilation * (kernel // 2),
        dilation=dilation,
        bias=not norm,
        norm=get_norm(norm, out_channels),
        activation=F.relu,
    )
    c2_msra_fill(conv)
    return conv


def _predictor(in_channels: int, num_classes: int) -> Conv2d:
    """Build the 1x1 convolution that predicts the logits."""
    predictor = Conv2d(in_channels, num_classes, kernel_size=1)
    c2_msra_fill(predictor)
    return predictor
