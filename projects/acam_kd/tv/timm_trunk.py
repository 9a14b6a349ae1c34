"""Any network of timm whose maps have strides 8, 16 and 32, as the trunk of a detector.

timm is an optional extra of the package. A network's name is timm's, with or without the tag of its weights, after
``timm:``, as in ``fcos_timm:tf_efficientnet_lite0_fpn64``.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork

from ..core.errors import ConfigError
from .zoo import downloading

__all__ = ["MARK", "TimmPyramid", "build_trunk", "is_timm", "pixels_of", "timm_stages"]

MARK = "timm:"
TRIED = (96, 160)
"""Height and width of the image on which a network must work, whatever image it was trained on."""
SHOWN = 3

logger = logging.getLogger("acam_kd")


class TimmPyramid(nn.Module):
    """timm's network with torchvision's feature pyramid, with the attributes of torchvision's ``BackboneWithFPN``.

    Args:
        body: from ``build_trunk``; its tensors keep timm's names.
        indices: the maps of the network that the pyramid takes, from the finest.
        widths: the channels of these maps.
        channels: the width of the pyramid.
        extra: more levels on top.
        norm: of the pyramid; None for none.
    """

    def __init__(
        self,
        body: nn.Module,
        indices: Sequence[int],
        widths: Sequence[int],
        channels: int,
        *,
        extra: ExtraFPNBlock,
        norm: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.body, self.indices = body, list(indices)
        self.fpn = FeaturePyramidNetwork(list(widths), channels, extra, norm)
        self.out_channels = channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the levels of the pyramid, (N, channels, H, W) each, of (N, 3, H, W)."""
        maps = _maps(self.body, self.indices, x)
        return self.fpn(OrderedDict((str(number), x) for number, x in enumerate(maps)))  # type: ignore[no-any-return]


def is_timm(name: str) -> bool:
    """Return whether the trunk of a named detector is timm's."""
    return f"_{MARK}" in name


def build_trunk(name: str, strides: Sequence[int], *, pretrained: bool) -> tuple[nn.Module, list[int], list[int]]:
    """Build a network of timm without its head, and tell the indices and channels of its maps of some strides.

    Args:
        name: timm's.
        strides: of the maps, from the finest.
        pretrained: with the weights that timm has under that name.

    Raises:
        ConfigError: timm is not installed or has no such network, or the network has no such maps, or works on images
            of one size only.
        RunError: the weights cannot be downloaded.
    """
    body = _created(name, pretrained)
    info: Any = getattr(body, "feature_info", None)
    known = {path for path, _ in body.named_modules()}
    found = {entry["reduction"]: number for number, entry in enumerate(info)} if isinstance(info, list) else {}
    if not set(strides) <= set(found):
        value = f"{MARK}{name} with maps of strides {', '.join(map(str, found)) or 'that timm does not tell'}"
        allowed = f"a network with maps of strides {', '.join(map(str, strides))}"
        raise ConfigError("name", value, allowed, "a plain ViT can teach, see docs/other_teachers.md")
    if not all(entry["module"] in known for entry in info):
        raise ConfigError("name", f"{MARK}{name}, whose parts and maps timm names differently", "another network")
    indices = [found[stride] for stride in strides]
    widths = [info[index]["num_chs"] for index in indices]
    body.prune_intermediate_layers(indices, prune_norm=True)  # type: ignore[operator]
    _try(name, body, indices, [(c, *(side // s for side in TRIED)) for c, s in zip(widths, strides)])
    return body, indices, widths


def _created(name: str, pretrained: bool) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        hint = "pip install 'acam-kd[timm]'"
        raise ConfigError(
            "name", f"{MARK}{name}, and timm is not installed", "a trunk of torchvision's", hint
        ) from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), SHOWN)
        allowed = f"a network of timm {timm.__version__}" + (f", as {', '.join(near)}" if near else "")
        raise ConfigError("name", f"{MARK}{name}", allowed, "timm.list_models() names all")
    with downloading(MARK + name):
        try:
            try:  # Swin takes images of any size only if asked for it, and most networks do not know the argument
                made = timm.create_model(name, pretrained=pretrained, strict_img_size=False)
            except TypeError:
                made = timm.create_model(name, pretrained=pretrained)
        except RuntimeError as error:  # timm's, of an unknown tag or a network without weights
            raise ConfigError("name", f"{MARK}{name} ({error})", "a network and a tag of timm's") from error
    return made  # type: ignore[no-any-return]


@torch.no_grad()
def _try(name: str, body: nn.Module, indices: list[int], shapes: list[tuple[int, ...]]) -> None:
    """Raise ConfigError unless the maps of an image have these shapes, (C, H, W) each."""
    body.eval()
    try:
        found = [tuple(x.shape[1:]) for x in _maps(body, indices, torch.zeros(1, 3, *TRIED))]
        trouble = "" if found == shapes else f"it puts out maps of {found}"
    except Exception as error:  # networks fail on such images in ways of their own
        trouble = str(error)
    body.train()
    if trouble:
        value = f"{MARK}{name}, which fails on an image of {TRIED[0]}x{TRIED[1]} ({trouble})"
        raise ConfigError("name", value, "a network for images of any size")


def _maps(body: Any, indices: Sequence[int], x: Tensor) -> list[Tensor]:
    return list(body.forward_intermediates(x, indices=indices, output_fmt="NCHW", intermediates_only=True))


def pixels_of(name: str, body: nn.Module) -> tuple[list[float], list[float]]:
    """Return mean and deviation of the pixels, of [0, 1] and RGB, that a network's weights were trained with."""
    import timm.data

    known: Any = timm.data.resolve_data_config({}, model=body)  # type: ignore[attr-defined, no-untyped-call]
    mean, std = list(known["mean"]), list(known["std"])
    shown = (" ".join(f"{x:g}" for x in values) for values in (mean, std))
    logger.info("pixels: mean %s, deviation %s, of [0, 1], RGB, as timm says of %s", *shown, name)
    return mean, std


def timm_stages(trunk: nn.Module) -> dict[str, int]:
    """Return the number of the stage, from 1, of each part of a network; parts within parts have dotted names.

    A stage ends with the part whose map timm names: stage 1 at stride 2, stage 5 at stride 32. A network that begins
    with stride 4 has no stage 1.
    """
    ends = [(entry["module"], max(1, round(math.log2(entry["reduction"])))) for entry in trunk.feature_info]  # type: ignore[union-attr]
    numbers: dict[str, int] = {}

    def visit(prefix: str, module: nn.Module) -> None:
        for child, part in module.named_children():
            path = prefix + child
            if any(end.startswith(f"{path}.") for end, _ in ends):
                visit(f"{path}.", part)
                continue
            numbers[path] = ends[0][1] if ends else 5
            if ends and ends[0][0] == path:
                ends.pop(0)

    visit("", trunk)
    return numbers
