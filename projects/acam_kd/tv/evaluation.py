"""Evaluation: COCO's average precision by pycocotools, and the mean intersection over union."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from ..data.labels import IGNORED
from .class_evaluation import ClassificationEvaluator
from .class_images import ClassImages
from .data import CocoImages, Images, evaluation_loader

__all__ = ["CocoEvaluator", "Evaluator", "SegmentationEvaluator", "build_evaluator", "evaluate_model", "evaluated"]

AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
MASK_THRESHOLD = 0.5


class Evaluator(Protocol):
    """A collector of outputs, image by image, that makes metrics of them; shares of several processes can be joined."""

    results: list[Any]

    def add(self, outputs: Iterable[dict[str, Tensor]], targets: Iterable[dict[str, Any]]) -> None:
        """Take a batch's outputs."""

    def metrics(self) -> dict[str, float]:
        """Compute the metrics of everything in ``results``, in percent."""


class CocoEvaluator:
    """Average precision of boxes, and of masks where there are any, as ``segm/AP``.

    Args:
        dataset: its json is the ground truth.
        images: the ids of the images that count; None for all.
    """

    def __init__(self, dataset: CocoImages, images: Sequence[int] | None = None) -> None:
        self.coco, self.images = dataset.coco, images
        self.category = {label: category for category, label in dataset.labels.items()}
        self.masks = dataset.masks
        self.results: list[dict[str, Any]] = []

    def add(self, outputs: Iterable[dict[str, Tensor]], targets: Iterable[dict[str, Any]]) -> None:
        """Take a batch of detections, in pixels of the original images; a label without category is dropped."""
        for output, target in zip(outputs, targets):
            boxes = output["boxes"].float().cpu()
            boxes[:, 2:] -= boxes[:, :2]
            for number, (box, label, score) in enumerate(
                zip(boxes.tolist(), output["labels"].tolist(), output["scores"].tolist())
            ):
                if label in self.category:
                    result = {
                        "image_id": target["image_id"],
                        "category_id": self.category[label],
                        "bbox": box,
                        "score": score,
                    }
                    if self.masks and "masks" in output:
                        result["segmentation"] = _encode(output["masks"][number, 0] > MASK_THRESHOLD)
                    self.results.append(result)

    def metrics(self) -> dict[str, float]:
        """Compute ``AP``, ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl`` in percent.

        A metric is NaN where there are no such objects. All are 0 if nothing was detected.
        """
        metrics = self._evaluate("bbox")
        if self.masks:
            metrics.update({f"segm/{name}": value for name, value in self._evaluate("segm").items()})
        return metrics

    def _evaluate(self, kind: str) -> dict[str, float]:
        if not self.results:
            return dict.fromkeys(AP_NAMES, 0.0)
        with contextlib.redirect_stdout(io.StringIO()):
            results = [dict(result) for result in self.results]  # pycocotools writes into them
            if kind == "segm":  # areas have to be the masks', and loadRes would take the boxes'
                for result in results:
                    result.pop("bbox")
            evaluation = COCOeval(self.coco, self.coco.loadRes(results), kind)
            if self.images is not None:
                evaluation.params.imgIds = sorted(self.images)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return {
            name: 100 * float(value) if value > -1 else float("nan") for name, value in zip(AP_NAMES, evaluation.stats)
        }


def _encode(mask: Tensor) -> dict[str, Any]:
    encoded = rle.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


class SegmentationEvaluator:
    """Mean intersection over union of all classes that the labels have, and pixel accuracy.

    Args:
        dataset: gives the number of classes, with the background.
    """

    def __init__(self, dataset: Images) -> None:
        self.num_classes = dataset.num_classes
        self.results: list[Tensor] = []

    def add(self, outputs: Iterable[dict[str, Tensor]], targets: Iterable[dict[str, Any]]) -> None:
        """Count a batch of label maps; results are confusion matrices (K, K), whose rows are the truth."""
        for output, target in zip(outputs, targets):
            truth, predicted = target["semantic"].flatten().cpu(), output["semantic"].flatten().cpu()
            counted = truth != IGNORED
            pairs = truth[counted] * self.num_classes + predicted[counted]
            self.results.append(torch.bincount(pairs, minlength=self.num_classes**2).view(2 * (self.num_classes,)))

    def metrics(self) -> dict[str, float]:
        """Compute ``mIoU`` and ``accuracy`` in percent."""
        confusion = torch.stack(self.results).sum(0).double()
        hits, union = confusion.diag(), confusion.sum(0) + confusion.sum(1) - confusion.diag()
        present = confusion.sum(1) > 0  # classes in the labels, as Detectron2 counts
        return {
            "mIoU": 100 * float((hits[present] / union[present]).mean()),
            "accuracy": 100 * float(hits.sum() / confusion.sum()),
        }


def build_evaluator(dataset: Images) -> Evaluator:
    """Build the evaluator for the dataset's targets."""
    if isinstance(dataset, CocoImages) and not dataset.semantic:
        return CocoEvaluator(dataset)
    if isinstance(dataset, ClassImages):
        return ClassificationEvaluator(dataset.categories)
    return SegmentationEvaluator(dataset)


def evaluate_model(
    model: nn.Module, data: Images, device: torch.device, *, batch_size: int, workers: int
) -> dict[str, float]:
    """Evaluate a model, which is put into evaluation mode, on a dataset."""
    return evaluated(model, data, device, batch_size=batch_size, workers=workers).metrics()


@torch.inference_mode()
def evaluated(model: nn.Module, data: Images, device: torch.device, *, batch_size: int, workers: int) -> Evaluator:
    """Return an evaluator with a model's outputs on a whole dataset; the model is put into evaluation mode."""
    model.to(device).eval()
    evaluator = build_evaluator(data)
    for images, targets in evaluation_loader(data, batch_size=batch_size, workers=workers):
        evaluator.add(model([image.to(device) for image in images]), targets)
    return evaluator
