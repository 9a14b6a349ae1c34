"""Predictions of a Detectron2 run's student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import SemanticSegmentor
from torch import Tensor, nn

from ..export.candidate import Candidate
from ..export.exported import as_image
from ..report.panels import Array
from ..report.predictions import Prediction
from .deployed import outputs_of
from .runs import load_run, read_classes

__all__ = ["D2Predictor", "load_candidate", "load_predictor"]


class D2Predictor:
    """A predictor with a Detectron2 model.

    Args:
        model: in evaluation mode.
        cfg: of the model; it decides size and order of the channels.
        categories: the dataset's ids -> names, in the model's order; empty where they are unknown.
    """

    def __init__(self, model: nn.Module, cfg: CfgNode, categories: Mapping[int, str]) -> None:
        self.model, self.categories = model, categories
        self.order = cfg.INPUT.FORMAT
        self.resize = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
        self._ids = np.array([*categories] or range(1, 10000))

    @torch.no_grad()
    def __call__(self, image: Array) -> Prediction:
        """Predict one image, uint8 RGB (H, W, 3)."""
        pixels = image[:, :, ::-1] if self.order == "BGR" else image
        resized = self.resize.get_transform(pixels).apply_image(np.ascontiguousarray(pixels))
        tensor = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)).astype(np.float32))
        height, width = image.shape[:2]
        (output,) = self.model([{"image": tensor, "height": height, "width": width}])
        return self._prediction(output)

    def _prediction(self, output: Mapping[str, Any]) -> Prediction:
        if "instances" not in output:
            return Prediction.of_map(output["sem_seg"].argmax(0).cpu().numpy())
        found = output["instances"].to("cpu")
        masks = found.pred_masks.numpy() if found.has("pred_masks") else None
        order = found.scores.argsort(descending=True).numpy()
        boxes, labels = found.pred_boxes.tensor.numpy()[order], self._ids[found.pred_classes.numpy()[order]]
        masks = None if masks is None else masks[order]
        keypoints = found.pred_keypoints.numpy()[order] if found.has("pred_keypoints") else None
        return Prediction(boxes, labels, found.scores.numpy()[order], masks, keypoints=keypoints)


class _Evaluated(nn.Module):
    """A predictor with the interface of torchvision's models in evaluation."""

    def __init__(self, predictor: D2Predictor) -> None:
        super().__init__()
        self.predictor, self.model = predictor, predictor.model

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Predict images (3, H, W), RGB in [0, 1], one by one."""
        return [_tensors(self.predictor(as_image(image))) for image in images]


def _tensors(found: Prediction) -> dict[str, Tensor]:
    if found.semantic is not None:
        return {"semantic": torch.from_numpy(found.semantic)}
    arrays = {"boxes": found.boxes, "labels": found.labels, "scores": found.scores}
    if found.masks is not None:
        arrays["masks"] = found.masks[:, None]
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def load_candidate(run: str, *, checkpoint: str, size: int | None) -> Candidate:
    """Load the student of a run's folder to measure it; see ``load_run``."""
    model, cfg, weights = load_run(run, checkpoint=checkpoint, size=size)
    semantic = isinstance(model, SemanticSegmentor)
    network = _Evaluated(D2Predictor(model, cfg, read_classes(run, semantic=semantic)))
    parameters = sum(p.numel() for p in model.parameters())
    return Candidate(
        run, network, cfg.MODEL.META_ARCHITECTURE, outputs_of(model), network.predictor.categories,
        Path(run) / weights, parameters, torch.device(cfg.MODEL.DEVICE),
    )  # fmt: skip


def load_predictor(run: str, *, checkpoint: str = "last", size: int | None = None) -> D2Predictor:
    """Load the student of a run's folder to predict with; see ``load_run``."""
    model, cfg, _ = load_run(run, checkpoint=checkpoint, size=size)
    categories = read_classes(run, semantic=isinstance(model, SemanticSegmentor))
    return D2Predictor(model, cfg, categories)
