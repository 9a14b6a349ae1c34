"""torchvision's detectors, segmentation models and classifiers by name, on any of its ResNets and MobileNets.

Names are torchvision's own, as ``fcos_resnet50_fpn`` or ``deeplabv3_resnet101``. More pyramid detectors are built from
torchvision's classes: ``<detector>_<trunk>_fpn<channels>``, as ``fcos_resnet18_fpn`` or
``retinanet_mobilenet_v2_fpn64``. ``<channels>`` is the width of the pyramid, 256 if left out. With ``_bn`` at the end
the pyramid has batch normalisation; without it, features trained from scratch grow to any scale. The
trunk may be timm's, as in ``fcos_timm:tf_efficientnet_lite0_fpn64``; see ``timm_trunk.py``. Two more models are
MobileNetV2's own: ``ssdlite320_mobilenet_v2`` and ``mobile_deeplabv3_mobilenet_v2``.
"""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models import list_models

from ..core.errors import ConfigError, RunError, first_line
from ..core.teacher import evaluating
from .cifar_nets import CIFAR_NETS, build_cifar_net
from .classification import Classifier, usual_size
from .mobilenets import MOBILE_DEEPLAB, SSDLITE, build_mobile_deeplab, build_ssdlite
from .norms import quicken
from .pyramids import PROBE, PYRAMID_DETECTORS, TRUNKS, build_pyramid_detector, is_pyramid_detector
from .segmentation import Segmentor
from .timm_trunk import MARK
from .trunk import FREEZE_AT, freeze, trunk_of
from .zoo import check_weights, get

__all__ = ["PROBE", "build_model", "is_classifier", "is_model", "is_segmentation", "needs_pairs", "plain"]

DETECTION = {SSDLITE, *(name for name in list_models(module=torchvision.models.detection) if "keypoint" not in name)}
SEGMENTATION = {MOBILE_DEEPLAB, *list_models(module=torchvision.models.segmentation)}
CLASSIFIERS = {*list_models(module=torchvision.models), *CIFAR_NETS}
OWN = (SSDLITE, MOBILE_DEEPLAB)
"""The models that are built here, and that torchvision has no weights of."""


def is_model(name: str) -> bool:
    """Return whether ``build_model`` knows a name."""
    return name in DETECTION | SEGMENTATION | CLASSIFIERS or is_pyramid_detector(name)


def is_classifier(name: str) -> bool:
    """Return whether a name means a model that gives a class to each image."""
    return name in CLASSIFIERS


def is_segmentation(name: str) -> bool:
    """Return whether a name means a model that labels pixels."""
    return name in SEGMENTATION


def needs_pairs(name: str) -> bool:
    """Return whether a model has batch norms on maps of one pixel, so that it cannot train on a single image."""
    return "deeplabv3" in name or name.startswith("ssdlite")


def build_model(
    name: str,
    *,
    num_classes: int | None,
    size: int | None = None,
    weights: str | None = None,
    backbone_weights: str | None = None,
) -> nn.Module:
    """Build a detector, or a segmentation model or a classifier within its criterion.

    Args:
        name: see the module.
        num_classes: their number, of detectors and segmentation with the background; None for that of ``weights``.
        size: the shorter side that images are resized to inside the model. None means torchvision's 800 in detectors,
            and no resizing in segmentation. SSD's size is fixed. A classifier's is the side of its square images.
        weights: a name of torchvision's weights for the whole model, as ``DEFAULT``, or None.
        backbone_weights: the same for the backbone. The first stages of a detector's backbone are then frozen.

    Raises:
        ConfigError: no model or no weights have that name.
        RunError: the weights cannot be downloaded.
    """
    if not is_model(name):
        raise ConfigError(
            "name",
            name,
            allowed=f"one of {', '.join(sorted(DETECTION | SEGMENTATION))}, or "
            f"({'|'.join(PYRAMID_DETECTORS)})_TRUNK_fpn[CHANNELS][_bn] with TRUNK {MARK}NETWORK or one of "
            f"{', '.join(sorted(TRUNKS))}; "
            f"or, for classes of images, {', '.join(CIFAR_NETS)} or a classifier of torchvision's",
        )
    if is_classifier(name):
        usual = usual_size(name)
        try:
            built_classifier = _classifier(name, num_classes, size or usual, weights, backbone_weights)
            if size not in (None, usual):
                _try(built_classifier)
        except (AssertionError, RuntimeError) as error:
            if size in (None, usual) or isinstance(error, RunError):
                raise
            found = f"{size}, which {name} does not take ({first_line(error)[:120]})"
            raise ConfigError("size", found, f"a size that it takes, as {usual}") from error
        return built_classifier
    arguments: dict[str, Any] = {} if size is None or name in SEGMENTATION else _sizes(name, size)
    if name in OWN or name not in DETECTION | SEGMENTATION:
        if weights:
            raise ConfigError(
                "weights",
                f"{weights} for {name}",
                allowed="a file, because torchvision has no weights of this model",
                hint="or give weights of its backbone, {backbone_weights}",
            )
        if name in OWN:
            return _mobile(name, num_classes, size, backbone_weights)
        return build_pyramid_detector(name, num_classes or 91, backbone_weights, arguments)
    if name.startswith("ssdlite") and backbone_weights:
        raise ConfigError(
            "backbone_weights",
            f"{backbone_weights} for {name}",
            allowed="none, because torchvision gives the backbone another shape then",
        )
    if name.startswith("ssd300") and backbone_weights == "DEFAULT":
        backbone_weights = "IMAGENET1K_FEATURES"  # its normalisation of pixels is made for these
    check_weights(name, weights)
    trunk = max((trunk for trunk in list_models(module=torchvision.models) if trunk in name), key=len)
    check_weights(trunk, backbone_weights, "backbone_weights")
    if name in SEGMENTATION and not name.startswith("lraspp"):
        arguments["aux_loss"] = True
    if name.startswith("fcos"):
        arguments["score_thresh"] = 0.05
    arguments["num_classes"] = None if weights else num_classes
    built = get(name, weights=weights, weights_backbone=backbone_weights, **arguments)
    if name not in SEGMENTATION:
        return built  # type: ignore[no-any-return]
    if not weights and not backbone_weights:
        quicken(built)
    return Segmentor(built, size=size)


def _mobile(name: str, num_classes: int | None, size: int | None, backbone_weights: str | None) -> nn.Module:
    """Build MobileNetV2's own detector or segmentation model; frozen is what a file freezes too, see ``trunk.py``."""
    check_weights("mobilenet_v2", backbone_weights, "backbone_weights")
    body = get("mobilenet_v2", weights=backbone_weights).features
    if name == MOBILE_DEEPLAB:
        return Segmentor(build_mobile_deeplab(body, num_classes or 21), size=size)
    model = build_ssdlite(body, num_classes or 91)
    trunk = trunk_of(model)
    if backbone_weights and trunk is not None:
        freeze(trunk, FREEZE_AT, "frozen")
    return model


def _classifier(
    name: str, num_classes: int | None, size: int, weights: str | None, backbone_weights: str | None
) -> Classifier:
    """Build a classifier; with weights of its trunk alone the last layer is new."""
    if name in CIFAR_NETS:
        for argument, value in (("weights", weights), ("backbone_weights", backbone_weights)):
            if value:
                raise ConfigError(argument, f"{value} for {name}", "a file, because torchvision does not know this net")
        return Classifier(build_cifar_net(name, num_classes or 1000), size=size)
    for argument, value in (("weights", weights), ("backbone_weights", backbone_weights)):
        check_weights(name, value, argument)
    arguments: dict[str, Any] = {"image_size": size} if name.startswith("vit_") else {}
    if name in ("googlenet", "inception_v3") and not (weights or backbone_weights):
        arguments |= {"aux_logits": False, "init_weights": False}
    elif name == "inception_v3":
        arguments["aux_logits"] = False
    if weights or backbone_weights:
        built = get(name, weights=weights or backbone_weights, **arguments)
    else:
        built = get(name, weights=None, num_classes=num_classes or 1000, **arguments)
    if backbone_weights and not weights:
        _renew_last_layer(built, num_classes or 1000)
    return Classifier(built, size=size)


@torch.no_grad()
def _try(model: Classifier) -> None:
    """Predict one black image of the model's size, in evaluation."""
    device = next(model.parameters()).device
    with evaluating(model):
        model([torch.zeros(3, model.size, model.size, device=device)])


def _renew_last_layer(network: nn.Module, num_classes: int) -> None:
    layers = [(path, part) for path, part in network.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    path, last = layers[-1]
    parent = network.get_submodule(path.rpartition(".")[0])
    made: nn.Module = (
        nn.Linear(last.in_features, num_classes)
        if isinstance(last, nn.Linear)
        else nn.Conv2d(last.in_channels, num_classes, 1)
    )
    parent.add_module(path.rpartition(".")[2], made)


def _sizes(name: str, size: int) -> dict[str, Any]:
    if name.startswith("ssd"):
        return {}  # SSD's size is fixed
    return {"min_size": size, "max_size": size * 5 // 3}  # the ratio of 800 and 1333


def plain(model: nn.Module) -> nn.Module:
    """Return torchvision's own model, which is saved and which anybody can load."""
    return model.network if isinstance(model, (Segmentor, Classifier)) else model
