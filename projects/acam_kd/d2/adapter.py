"""The adapter of Detectron2's models: backbone, a segmentor's map of logits, a detector's class head, annotations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, GeneralizedRCNN, SimpleFeaturePyramid
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.modeling.meta_arch.semantic_seg import SemanticSegmentor
from detectron2.modeling.roi_heads import RROIHeads
from detectron2.structures import ImageList
from torch import Tensor, nn

from ..core import (
    BACKBONE,
    CLASSES,
    IGNORED,
    LOGITS,
    Adapter,
    ConfigError,
    FeatureSpec,
    ModuleTap,
    Pixels,
    Reader,
    Targets,
)
from ..core.features import NECK_CONVS, Features
from ..core.reader import as_mapping, named
from ..core.teacher import Extract, call
from .class_heads import anchors_of, backbone_and_classes, class_head, class_spec, score_reader
from .distillation import D2Distillation
from .neck import neck_levels, neck_taps, with_neck_convs
from .reppoints import RepPoints

__all__ = ["D2Adapter", "adapt", "backbone_and_logits", "backbone_of", "logits_module", "pixels_of", "pyramid"]


def adapt(model: nn.Module, example_inputs: Any = None) -> D2Adapter | None:
    """Return the adapter of a Detectron2 model, which says its shapes itself; None for any other module."""
    return D2Adapter(model) if isinstance(getattr(model, "backbone", None), Backbone) else None


FAMILIES = {
    SemanticSegmentor: "semseg",
    RetinaNet: "retinanet",
    FCOS: "fcos",
    RepPoints: "reppoints",
    GeneralizedRCNN: "rcnn",
}
"""Meta-architecture -> the kind of model in the recipes of methods."""


class D2Adapter(Adapter):
    """A model with a Detectron2 backbone.

    Args:
        model: GeneralizedRCNN, RetinaNet, FCOS, RepPoints, SemanticSegmentor, PanopticFPN or another one with a
            ``backbone``.
        input_format: of its images, as in INPUT.FORMAT; the model's own ``input_format`` if left out.
        class_names: of its predictions, if they are known.
    """

    distillation = D2Distillation

    def __init__(self, model: nn.Module, *, input_format: str = "", class_names: Sequence[str] = ()) -> None:
        super().__init__(model)
        backbone_of(model)
        self._segmentor = isinstance(model, SemanticSegmentor)
        self.family = next((name for kind, name in FAMILIES.items() if isinstance(model, kind)), "")
        self.offered = (LOGITS, BACKBONE) if self._segmentor else (BACKBONE, CLASSES)
        self.on_request = (NECK_CONVS,) if neck_levels(model.backbone) else ()
        self.annotations = ("labels",) if self._segmentor else ("boxes", "labels")
        self.class_names = class_names
        self.read_scores = score_reader(model)
        self.pixels = pixels_of(model, input_format)
        self.box_dimension = 5 if isinstance(getattr(model, "roi_heads", None), RROIHeads) else 4

    @property
    def kind(self) -> Any:
        """Meta-architecture and RoI heads; None for segmentors, which inherit only when asked."""
        heads = type(getattr(self.model, "roi_heads", None)).__name__
        return None if self._segmentor else (self.name, "" if heads == "NoneType" else heads)

    @property
    def trunk(self) -> str:
        """Everything but neck and heads."""
        if isinstance(self.model.backbone, SimpleFeaturePyramid):
            return "backbone.net."
        return "backbone.bottom_up." if hasattr(self.model.backbone, "bottom_up") else "backbone."

    @property
    def num_classes(self) -> int:
        """The number of classes that it predicts, without the background; 0 if it does not say."""
        detector = getattr(self.model, "roi_heads", self.model)
        predictor = getattr(getattr(self.model, "sem_seg_head", None), "predictor", None)
        number = getattr(detector, "num_classes", None) or getattr(predictor, "out_channels", None)
        return number if isinstance(number, int) else 0

    @property
    def class_layers(self) -> Sequence[str]:  # type: ignore[override]
        """The last layers of its heads; of boxes only where each class has its own."""
        layers = ["head.cls_score.", "roi_heads.mask_head.predictor.", "sem_seg_head.predictor."]
        for name, layer in self.model.named_modules():
            shared = name.endswith("bbox_pred") and getattr(layer, "out_features", 0) == self.box_dimension
            if name.startswith("roi_heads.box_predictor") and isinstance(layer, nn.Linear) and not shared:
                layers.append(f"{name}.")
        return layers

    def background(self, spec: FeatureSpec) -> int | None:
        """Return the last channel of a box head's softmax."""
        return spec.channels - 1 if spec.tap == CLASSES and not spec.sigmoid else None

    def levels(self, taps: Sequence[str], *, side: int = 0, student: bool = False) -> dict[str, FeatureSpec]:
        """Return what the model's parts say of themselves."""
        return pyramid(self.model, taps, student=student)

    def network(self, taps: Sequence[str]) -> tuple[nn.Module, Extract]:
        """Return the backbone, or the whole model for predictions."""
        network = backbone_of(self.model)
        extract: Extract = call
        if CLASSES in taps:
            network, extract = self.model, backbone_and_classes
        elif LOGITS in taps:
            network, extract = self.model, backbone_and_logits
        return network, with_neck_convs(extract) if NECK_CONVS in taps else extract

    def reader(self, taps: Sequence[str]) -> Reader:
        """Put taps on the backbone and, for predictions, on the head."""
        backbone = ModuleTap(backbone_of(self.model), "backbone")
        parts: list[Any] = [(backbone, as_mapping)]
        if LOGITS in taps:
            parts.append((ModuleTap(logits_module(self.model), "predictor"), named(LOGITS)))
        if NECK_CONVS in taps:
            parts += neck_taps(backbone_of(self.model))
        head = class_head(self.model) if CLASSES in taps else None
        return Reader(parts, batch_from=backbone, class_head=head)

    def logits_module(self) -> nn.Module | None:
        """Return the convolution that gives the logits of a segmentor, None for other models."""
        return logits_module(self.model) if self._segmentor else None

    def anchors(self) -> list[Tensor] | None:
        """Return cell anchors and strides of a RetinaNet or FCOS."""
        return anchors_of(self.model)

    def targets(self, reader: Reader, batched_inputs: list[dict[str, Any]], *args: Any, **kwargs: Any) -> Targets:
        """Return boxes, image sizes and, of a segmentor, the labels of all pixels, on the student's device.

        Boxes are unknown where no input has ``instances``.
        """
        device = next(self.model.parameters()).device
        sizes = torch.tensor([x["image"].shape[-2:] for x in batched_inputs], dtype=torch.float32, device=device)
        with_boxes = [(i, x["instances"]) for i, x in enumerate(batched_inputs) if "instances" in x]
        if not with_boxes:
            return Targets(labels=self._labels(batched_inputs, device))
        owners = [torch.full((len(instances),), i) for i, instances in with_boxes]
        return Targets(
            boxes=torch.cat([instances.gt_boxes.tensor.to(device) for _, instances in with_boxes]),
            box_images=torch.cat(owners).to(device),
            image_sizes=sizes,
            labels=self._labels(batched_inputs, device),
        )

    def _labels(self, batched_inputs: list[dict[str, Any]], device: torch.device) -> dict[str, Tensor]:
        head: Any = getattr(self.model, "sem_seg_head", None)
        if not hasattr(head, "ignore_value") or "sem_seg" not in batched_inputs[0]:
            return {}
        backbone: Any = backbone_of(self.model)
        labels = ImageList.from_tensors(
            [x["sem_seg"].to(device) for x in batched_inputs],
            backbone.size_divisibility,
            head.ignore_value,
            backbone.padding_constraints,
        ).tensor
        return {LOGITS: labels.masked_fill(labels == head.ignore_value, IGNORED)}


def pixels_of(model: nn.Module, input_format: str = "") -> Pixels | None:
    """Return the pixel statistics of a model of Detectron2's kind; None for one that has none.

    Args:
        model: has the buffers ``pixel_mean`` and ``pixel_std``, for pixels from 0 to 255.
        input_format: of its images; the model's own ``input_format`` if left out.
    """
    order = input_format or getattr(model, "input_format", None) or ""
    mean, std = getattr(model, "pixel_mean", None), getattr(model, "pixel_std", None)
    if not isinstance(mean, Tensor) or not isinstance(std, Tensor) or mean.is_meta or std.is_meta:
        return None
    return Pixels(_exact(mean), _exact(std), order, 255.0)


def _exact(values: Tensor) -> list[float]:
    """Return the shortest decimals that are these float32 values: those of the config, for equal rounding."""
    return [float(str(value)) for value in values.flatten().cpu().numpy()]


def backbone_of(model: nn.Module) -> nn.Module:
    """Return a model's backbone.

    Raises:
        ConfigError: it has none.
    """
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise ConfigError(
            "student", f"{type(model).__name__} without a `backbone`", "a model whose `backbone` returns maps",
            "or name the parts to distil by path: acam_kd.distill(..., student_levels={'res4': 'detr.backbone[res4]'})",
        )  # fmt: skip
    return backbone


def logits_module(model: nn.Module) -> nn.Module:
    """Return the convolution whose output is the map of logits: Detectron2 calls it ``predictor`` in all of its heads.

    Raises:
        ConfigError: there is none, or its stride is unknown.
    """
    head = getattr(model, "sem_seg_head", None)
    predictor = getattr(head, "predictor", None)
    if not isinstance(predictor, nn.Conv2d) or not isinstance(getattr(head, "common_stride", None), int):
        raise ConfigError(
            "taps", f"{LOGITS}, and a {type(model).__name__} whose head is {type(head).__name__}",
            "a `sem_seg_head` with a convolution `predictor` and a `common_stride`",
            "choose another head or {teacher}, or distil the backbones by {taps}",
        )  # fmt: skip
    return predictor


def pyramid(model: nn.Module, taps: Sequence[str], *, student: bool = False) -> dict[str, FeatureSpec]:
    """Return channels and stride of every level that the taps give; a student's class head must be of one stage."""
    levels: dict[str, FeatureSpec] = {}
    if BACKBONE in taps:
        shapes: dict[str, ShapeSpec] = backbone_of(model).output_shape()  # type: ignore[operator]
        levels |= {name: FeatureSpec(channels=s.channels, stride=s.stride) for name, s in shapes.items()}
    if LOGITS in taps:
        predictor: Any = logits_module(model)
        head: Any = model.sem_seg_head
        levels[LOGITS] = FeatureSpec(predictor.out_channels, head.common_stride, logits=True)
    if CLASSES in taps:
        levels[CLASSES] = class_spec(model, student=student)
    if NECK_CONVS in taps:
        levels |= neck_levels(backbone_of(model))
    return levels


class _Reached(Exception):
    """Carries the logits out of a head, before it scales them up."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits


def _leave(module: nn.Module, args: Any, output: Tensor) -> None:
    raise _Reached(output)


def backbone_and_logits(model: nn.Module, batch: Tensor) -> Features:
    """Return all levels of a segmentor in evaluation mode for a normalised batch, outside of its own forward.

    Heads differ in what they have besides ``forward``, so it is run, and left where the logits are made: scaled up to
    the image they would take more memory than the rest.
    """
    features: Features = backbone_of(model)(batch)
    handle = logits_module(model).register_forward_hook(_leave)
    try:
        model.sem_seg_head(features)  # type: ignore[operator]
    except _Reached as reached:
        return {**features, LOGITS: reached.logits}
    finally:
        handle.remove()
    raise ConfigError("taps", LOGITS, "a head that calls its `predictor`", f"that of a {type(model).__name__} does not")
