"""The export of a Detectron2 run's student by Detectron2's tracing adapter, checked on images of several sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..export.checked import CHECKED, Comparison, export_model
from ..export.exported import DETECTION, SEGMENTATION, Metadata, as_pixels
from ..report.media import IMAGES, media_files, read_image
from .config_files import read_config
from .runs import load_run, read_classes

__all__ = ["DeployedD2", "export_run"]


class DeployedD2(nn.Module):
    """A Detectron2 model that takes one image of the size that it is to have, and returns tensors.

    Args:
        model: in evaluation mode.
        order: of its channels, ``"BGR"`` or ``"RGB"``.
        ids: the dataset's id of each class.
    """

    def __init__(self, model: nn.Module, order: str, ids: Sequence[int]) -> None:
        super().__init__()
        self.order = order
        self.semantic = not hasattr(model, "proposal_generator") and not hasattr(model, "head")
        self.outputs: tuple[str, ...] = SEGMENTATION if self.semantic else DETECTION
        self.register_buffer("ids", torch.tensor([*ids] or [*range(1, 1000)]))
        self.adapter = TracingAdapter(model, [{"image": torch.zeros(3, 64, 64)}], self._infer, allow_non_tensor=False)
        self.eval().requires_grad_(False)

    def _infer(self, model: Any, inputs: list[dict[str, Tensor]]) -> Any:
        if isinstance(model, GeneralizedRCNN):
            (found,) = model.inference(inputs, do_postprocess=False)
        else:
            images = model.preprocess_image(inputs)
            features = model.backbone(images.tensor)
            if self.semantic:
                height, width = inputs[0]["image"].shape[1:]
                logits, _ = model.sem_seg_head(features)
                return logits[:, :, :height, :width].argmax(1)
            predictions = model.head([features[name] for name in model.head_in_features])
            (found,) = model.forward_inference(images, [features[n] for n in model.head_in_features], predictions)
        return found.pred_boxes.tensor, found.scores, self.ids[found.pred_classes]  # type: ignore[index]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Predict one image; see ``tv.deployed.Deployed``. Labels are the dataset's ids."""
        pixels = images[0] * 255
        pixels = pixels.flip(0) if self.order == "BGR" else pixels
        return tuple(self.adapter(pixels))

    def exporting(self) -> AbstractContextManager[Any]:
        """Return a context for torch.export, in which nothing is to be changed."""
        return contextlib.nullcontext()


def export_run(
    run: str,
    path: str | Path,
    *,
    kind: str,
    checkpoint: str = "last",
    size: int | None = None,
    images: Sequence[str] = (),
) -> list[Comparison]:
    """Export the student of a run's folder; see ``export_model``.

    The file takes images that are resized already; its metadata says to which size. Of Mask R-CNN it has the boxes.

    Args:
        run: the folder.
        path: the file.
        kind: see ``export_model``.
        checkpoint: ``"last"`` or ``"best"``.
        size: the shorter side of images; None for the config's.
        images: files and folders to check with; none for images of the run's test dataset.
    """
    model, cfg, weights = load_run(run, checkpoint=checkpoint, size=size)
    files = media_files(images, suffixes=IMAGES)[:CHECKED] if images else _images_of(run)
    pixels = [as_pixels(read_image(file)) for file in files]
    categories = read_classes(run, semantic=cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor")
    deployed = DeployedD2(model.cpu(), cfg.INPUT.FORMAT, [*categories])
    metadata = _metadata(run, cfg, deployed, categories, weights)
    return export_model(deployed, metadata, pixels, path, kind=kind)


def _images_of(run: str) -> list[Path]:
    """Return a few images of the run's first test dataset, as its config names it.

    Raises:
        ConfigError: they are not there any more.
    """
    datasets = read_config(str(Path(run) / "config.yaml"), argument="run").get("DATASETS", {})
    tests, named = datasets.get("TEST", []), [*datasets.get("COCO_FORMAT", []), *datasets.get("SEM_SEG", [])]
    roots = [entry[2] if str(entry[1]).endswith(".json") else entry[1] for entry in named if entry[0] in tests]
    found = media_files(roots[:1], suffixes=IMAGES)[:CHECKED] if roots and Path(roots[0]).is_dir() else []
    if not found:
        raise ConfigError("images", f"none: the test images of {run} are not known", "image files", "give {images}")
    return found


def _metadata(run: str, cfg: CfgNode, deployed: DeployedD2, categories: dict[int, str], weights: str) -> Metadata:
    mean, std = ([value / 255 for value in values] for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    if cfg.INPUT.FORMAT == "BGR":
        mean, std = mean[::-1], std[::-1]
    return Metadata(
        cfg.MODEL.META_ARCHITECTURE, deployed.outputs, categories, len(categories), None, tuple(mean), tuple(std),
        weights=weights, resize=(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST),
    )  # fmt: skip
