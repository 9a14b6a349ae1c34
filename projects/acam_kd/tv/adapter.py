"""The adapters of torchvision's models: detectors, segmentation models, classifiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.ssd import SSD
from torchvision.models.segmentation import LRASPP
from torchvision.models.segmentation._utils import _SimpleSegmentationModel

from ..core import (
    BACKBONE,
    CLASSES,
    IGNORED,
    LOGITS,
    Adapter,
    FeatureSpec,
    ModuleAdapter,
    ModuleTap,
    Pixels,
    Reader,
    Targets,
)
from ..core.features import Features
from ..core.reader import as_mapping, named
from ..core.taps import Tap
from ..core.teacher import Extract, call, evaluating
from ..data.labels import IGNORED as UNLABELLED
from .class_adapter import ClassifierAdapter
from .class_heads import anchors_of, backbone_and_classes, class_head, class_spec, read_scores
from .classification import Classifier
from .mobilenets import SSDLiteBackbone
from .models import PROBE, plain
from .segmentation import Segmentor
from .stages import stages
from .timm_trunk import TimmPyramid

__all__ = [
    "DetectorAdapter",
    "SegmentorAdapter",
    "adapt",
    "backbone_and_logits",
    "logits_module",
    "pixels_of",
    "without_aux",
]

DETECTORS = (FasterRCNN, RetinaNet, FCOS, SSD)
"""With their subclasses, as Mask and Keypoint R-CNN."""
NETWORKS = (_SimpleSegmentationModel, LRASPP)


def adapt(model: nn.Module, example_inputs: Any = None) -> Adapter | None:
    """Return the adapter of a torchvision model; None for any other module.

    Args:
        model: a detector, a segmentation model or a classifier.
        example_inputs: a batch by which a classifier is measured; the others are measured on an empty image.
    """
    if isinstance(model, DETECTORS):
        return DetectorAdapter(model)
    if isinstance(model, Classifier):
        return ClassifierAdapter(model)
    if isinstance(model, (Segmentor, *NETWORKS)):
        return SegmentorAdapter(model)
    if type(model).__module__.startswith("torchvision.models.") and type(model).__module__.count(".") == 2:
        return ModuleAdapter(model, stages(model, example_inputs), example_inputs=example_inputs, named=False)
    return None


def pixels_of(model: nn.Module) -> Pixels | None:
    """Return the pixel statistics of a model that normalises images itself; None for any other.

    Args:
        model: a detector, a ``Segmentor`` or a ``Classifier``, for pixels from 0 to 1.
    """
    normalising: Any = getattr(model, "transform", None) if isinstance(model, DETECTORS) else model
    if not isinstance(model, (*DETECTORS, Segmentor, Classifier)):
        return None
    return Pixels(normalising.image_mean, normalising.image_std, "RGB", 1.0)


class _Adapter(Adapter):
    """A model whose shapes are measured on an empty image."""

    extract: Any

    @torch.no_grad()
    def _measured(self, network: nn.Module, extract: Extract, side: int) -> dict[str, tuple[int, int]]:
        """Return level -> channels and stride."""
        like = next(network.parameters())
        with evaluating(network):  # DeepLabV3 normalises over the batch, which one image is none of
            features = extract(network, torch.zeros(1, 3, side, side, device=like.device, dtype=like.dtype))
        return {name: (x.shape[1], round(side / x.shape[-1])) for name, x in features.items()}


TRUNKED = (BackboneWithFPN, SSDLiteBackbone, TimmPyramid)
"""The backbones that are a trunk and more; the trunk is their ``body``."""
FAMILIES = {RetinaNet: "retinanet", FCOS: "fcos", FasterRCNN: "rcnn"}
"""Detector -> the kind of model in the recipes of methods; Mask and Keypoint R-CNN are Faster R-CNNs."""


class DetectorAdapter(_Adapter):
    """RetinaNet, FCOS, SSD, and Faster, Mask or Keypoint R-CNN."""

    offered = (BACKBONE, CLASSES)
    read_scores = staticmethod(read_scores)
    annotations = ("boxes", "labels")
    class_layers = (
        "head.classification_head.cls_logits.", "head.classification_head.module_list.", "roi_heads.box_predictor.",
        "roi_heads.mask_predictor.mask_fcn_logits.",
    )  # fmt: skip

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.family = next((name for kind, name in FAMILIES.items() if isinstance(model, kind)), "")
        self.pixels = pixels_of(model)

    @property
    def kind(self) -> Any:
        """The class of the detector."""
        return type(self.model)

    @property
    def trunk(self) -> str:
        """The FPN is a part of torchvision's ``backbone``."""
        return "backbone.body." if isinstance(self.model.backbone, TRUNKED) else "backbone."

    def background(self, spec: FeatureSpec) -> int | None:
        """Return channel 0: dense heads have one for the background too."""
        return 0 if spec.tap == CLASSES else None

    def side(self) -> int:
        """Return a side of the images by which the model's strides can be measured: SSD's is fixed."""
        fixed = getattr(self.model.transform, "fixed_size", None)
        return int(fixed[0]) if fixed else PROBE

    def levels(self, taps: Sequence[str], *, side: int = 0, student: bool = False) -> dict[str, FeatureSpec]:
        """Return the measured levels and the predicted classes."""
        levels: dict[str, FeatureSpec] = {}
        if BACKBONE in taps:
            shapes = self._measured(self.model.backbone, call, side or self.side())  # type: ignore[arg-type]
            levels |= {name: FeatureSpec(*shape) for name, shape in shapes.items()}
        return levels | ({CLASSES: class_spec(self.model, student=student)} if CLASSES in taps else {})

    def network(self, taps: Sequence[str]) -> tuple[nn.Module, Extract]:
        """Return the backbone, or the whole detector for predictions."""
        if CLASSES in taps:
            return self.model, backbone_and_classes
        return self.model.backbone, call  # type: ignore[return-value]

    def reader(self, taps: Sequence[str]) -> Reader:
        """Put taps on backbone, class head and the transform, which resizes boxes."""
        backbone = ModuleTap(self.model.backbone, "backbone")  # type: ignore[arg-type]
        resized = ModuleTap(self.model.transform, "transform")  # type: ignore[arg-type]
        head = class_head(self.model) if CLASSES in taps else None
        return Reader([(backbone, as_mapping)], batch_from=backbone, class_head=head, others=[resized])

    def anchors(self) -> list[Tensor] | None:
        """Return sizes and ratios of the anchors of a dense detector."""
        return anchors_of(self.model)

    def targets(self, reader: Reader, *args: Any, **kwargs: Any) -> Targets:
        """Return the boxes of the batch as the student resized it."""
        (resized,) = reader.others
        batch, targets = reader.read_other(resized).output
        if targets is None:
            return Targets()
        boxes = [target["boxes"] for target in targets]
        owners = [torch.full((len(b),), i, device=b.device) for i, b in enumerate(boxes)]
        return Targets(
            boxes=torch.cat(boxes),
            box_images=torch.cat(owners),
            image_sizes=torch.tensor(batch.image_sizes, dtype=torch.float32, device=batch.tensors.device),
        )


class SegmentorAdapter(_Adapter):
    """A segmentation model, alone or in a ``Segmentor``, which normalises images and makes losses."""

    family = "semseg"
    offered = (LOGITS, BACKBONE)
    annotations = ("labels",)
    class_layers = (
        "classifier.4.", "aux_classifier.4.", "classifier.low_classifier.", "classifier.high_classifier."
    )  # the last convolutions of DeepLabV3 and FCN, and of LR-ASPP  # fmt: skip

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.pixels = pixels_of(model)

    @property
    def name(self) -> str:
        """The kind of torchvision's model."""
        return type(plain(self.model)).__name__

    @property
    def inheriting(self) -> nn.Module:
        """Torchvision's own model."""
        return plain(self.model)

    def side(self) -> int:
        """Return the side of the images by which strides are measured."""
        return PROBE

    def levels(self, taps: Sequence[str], *, side: int = 0, student: bool = False) -> dict[str, FeatureSpec]:
        """Return the measured levels; the backbone's map for the auxiliary head is none of them."""
        shapes = self._measured(plain(self.model), backbone_and_logits, side or self.side())
        return {
            name: FeatureSpec(*shape, logits=name == LOGITS)
            for name, shape in shapes.items()
            if (LOGITS if name == LOGITS else BACKBONE) in taps and name != "aux"
        }

    def network(self, taps: Sequence[str]) -> tuple[nn.Module, Extract]:
        """Return the backbone, or torchvision's whole model for the map of logits."""
        network = plain(self.model)
        if LOGITS in taps:
            return network, backbone_and_logits
        return network.backbone, call  # type: ignore[return-value]

    def logits_module(self) -> nn.Module:
        """Return the classifier, whose output is the map of logits."""
        return logits_module(self.model)

    def reader(self, taps: Sequence[str]) -> Reader:
        """Put taps on backbone and classifier."""
        backbone = ModuleTap(plain(self.model).backbone, "backbone")  # type: ignore[arg-type]
        parts: list[tuple[Tap, Any]] = [(backbone, without_aux)]
        if LOGITS in taps:
            parts.append((ModuleTap(logits_module(self.model), "classifier"), named(LOGITS)))
        return Reader(parts, batch_from=backbone)

    def targets(self, reader: Reader, *args: Any, **kwargs: Any) -> Targets:
        """Return the labels of all pixels; they are unknown to a model that is trained without a ``Segmentor``."""
        if not isinstance(self.model, Segmentor) or len(args) < 2:
            return Targets()
        images, targets = args[:2]
        labels = self.model.labels(targets)
        sizes = [self.model.batch([image]).shape[-2:] for image in images]
        return Targets(
            image_sizes=torch.tensor(sizes, dtype=torch.float32, device=labels.device),
            labels={LOGITS: labels.masked_fill(labels == UNLABELLED, IGNORED)},
        )


def without_aux(output: Any, batch: Tensor) -> Mapping[str, Tensor]:
    """Return the maps of a segmentation backbone but the one for the auxiliary head."""
    return {name: x for name, x in as_mapping(output, batch).items() if name != "aux"}


def logits_module(model: nn.Module) -> nn.Module:
    """Return the module of a segmentation model whose output is its map of logits before upsampling."""
    return plain(model).classifier  # type: ignore[return-value]


def backbone_and_logits(model: nn.Module, batch: Tensor) -> Features:
    """Return all levels of a segmentation model for a normalised batch, outside of its own forward."""
    network = plain(model)
    features: dict[str, Tensor] = network.backbone(batch)  # type: ignore[operator]
    logits: Tensor = network.classifier(features if isinstance(network, LRASPP) else features["out"])  # type: ignore[operator]
    return {**features, LOGITS: logits}
