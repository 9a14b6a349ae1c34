"""FPNs: one over any trunk as the config says, and the tap on its levels before they are normalised."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import FPN, Backbone
from torch import Tensor, nn

from ..core.features import Features, FeatureSpec
from ..core.reader import Convert, named
from ..core.taps import ModuleTap, leave_to_python
from ..core.teacher import Extract

__all__ = ["fpn_over", "neck_levels", "neck_taps", "with_neck_convs"]


def fpn_over(cfg: CfgNode, bottom_up: Backbone, top_block: nn.Module) -> FPN:
    """Build the FPN of ``MODEL.FPN`` over a trunk."""
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def neck_convs(backbone: Any) -> dict[str, nn.Conv2d]:
    """Return level -> the last convolution of an FPN for it; levels that no convolution makes are left out."""
    found: dict[str, nn.Conv2d] = {}
    for name, spec in backbone.output_shape().items() if isinstance(backbone, FPN) else ():
        stage = spec.stride.bit_length() - 1
        conv = getattr(backbone, f"fpn_output{stage}", None) or getattr(backbone.top_block, name, None)
        if isinstance(conv, nn.Conv2d):
            found[f"{name}_conv"] = conv
    return found


def neck_levels(backbone: Any) -> dict[str, FeatureSpec]:
    """Return the shapes of the levels; the level p3 is called ``p3_conv`` before its normalisation."""
    convs = neck_convs(backbone)
    shapes = backbone.output_shape() if convs else {}
    strides = {level: shapes[level.removesuffix("_conv")].stride for level in convs}
    return {level: FeatureSpec(conv.out_channels, strides[level], before_norm=True) for level, conv in convs.items()}


class InputTap(ModuleTap):
    """A tap on the input of a module in place of its output."""

    @leave_to_python
    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.armed:
            self.record(args, kwargs, args[0])


def neck_taps(backbone: Any) -> list[tuple[ModuleTap, Convert]]:
    """Put a tap on every level before its normalisation."""
    taps: list[tuple[ModuleTap, Convert]] = []
    for level, conv in neck_convs(backbone).items():
        norm = _norm(conv)
        tap = ModuleTap(conv, level) if norm is None else InputTap(norm, level)
        taps.append((tap, named(level)))
    return taps


def with_neck_convs(extract: Extract) -> Extract:
    """Return a function that adds the levels before their normalisation to the features of another one."""
    return partial(_extract_both, extract)


def _extract_both(extract: Extract, network: Any, batch: Tensor, *regions: Any) -> Features:
    found: dict[str, Tensor] = {}
    handles = []
    for level, conv in neck_convs(getattr(network, "backbone", network)).items():
        norm = _norm(conv)
        if norm is None:
            handles.append(conv.register_forward_hook(partial(_keep_output, found, level)))
        else:
            handles.append(norm.register_forward_pre_hook(partial(_keep_input, found, level)))
    try:
        return {**extract(network, batch, *regions), **found}
    finally:
        for handle in handles:
            handle.remove()


def _norm(conv: nn.Conv2d) -> nn.Module | None:
    norm = getattr(conv, "norm", None)
    return norm if isinstance(norm, nn.Module) else None


def _keep_output(found: dict[str, Tensor], level: str, module: nn.Module, args: Sequence[Any], output: Tensor) -> None:
    found[level] = output


def _keep_input(found: dict[str, Tensor], level: str, module: nn.Module, args: Sequence[Any]) -> None:
    found[level] = args[0]
