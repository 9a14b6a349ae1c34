"""Pseudo-labels: the teacher's own predictions on images without labels, as files, and used like labels."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ..core import ConfigError
from ..core.teacher import evaluating
from ..data.coco import CocoSplit
from ..data.labels import IGNORED
from ..data.pseudo_labels import MADE, Boxes, class_names, json_of, label_files
from ..data.splits import LabelSplit
from ..files import to_json, write_atomically
from .build import Models
from .data import Images, evaluation_loader
from .folder import RunFolder
from .labels import load_data
from .models import is_classifier
from .run import Settings
from .segmentation import Segmentor
from .unlabelled import Several, UnlabelledBatches, UnlabelledImages

__all__ = ["build_unlabelled", "check_models"]

logger = logging.getLogger("acam_kd")

FOLDER = "pseudo_labels"
NAME = "pseudo-labels"


def check_models(settings: Settings, models: Models) -> None:
    """Check that student and teacher can use images without labels.

    Raises:
        ConfigError: the method cannot, or the teacher cannot label for this student.
    """
    if not settings.unlabelled:
        return
    if is_classifier(settings.student_name):
        raise ConfigError(
            "unlabelled", f"a classifier, {settings.student_name}", "a detector or a segmentor as {student}"
        )
    if not settings.pseudo_labels:
        models.student.distillation.on_unlabelled.check()  # type: ignore[union-attr,operator]
        return
    if not models.comparable:
        hint = "its predictions are the labels; see {teacher}"
        raise ConfigError("pseudo_labels", "a teacher of other classes, or of another task", "the data's own", hint)
    if settings.student_name.startswith("maskrcnn"):
        raise ConfigError(
            "pseudo_labels", f"{settings.student_name}, which learns masks", "a detector of boxes, or a segmentor"
        )


def build_unlabelled(
    fabric: Fabric, settings: Settings, models: Models, images: UnlabelledImages, training: Images, folder: RunFolder
) -> UnlabelledBatches:
    """Build the batches of the second loader; with pseudo-labels, after the teacher has made these.

    They are made once: a resumed run takes the files that are there.

    Args:
        fabric: launched.
        settings: of the run.
        models: its student and teacher.
        images: those without labels.
        training: the labelled images, whose classes count.
        folder: of the run.

    Raises:
        ConfigError: the teacher predicts nothing that is sure enough, or the files do not pass the checks of all data.
        RunError: a file cannot be written.
    """
    start = f" from step {settings.unlabelled_start}" if settings.unlabelled_start else ""
    logger.info("%d images without labels, %d a step%s", len(images), settings.unlabelled_batch, start)
    if not settings.pseudo_labels:
        return UnlabelledBatches(images, settings)
    place = folder.path / FOLDER
    if not fabric.broadcast((place / MADE).is_file()):
        assert models.teacher is not None
        _make(fabric, settings, models.teacher, images, training, folder)
    return UnlabelledBatches(Several(_load(settings, images, training, place)), settings, labelled=True)


def _make(
    fabric: Fabric, settings: Settings, teacher: nn.Module, images: UnlabelledImages, training: Images,
    folder: RunFolder,
) -> None:  # fmt: skip
    """Label all images, each process its share, and write the files; the last one says that they are complete."""
    found = _label(fabric, settings, teacher, images, training, folder)
    if fabric.world_size > 1:
        shares: list[Any] = [None] * fabric.world_size
        torch.distributed.all_gather_object(shares, found)
        found = [item for share in shares for item in share]
    found.sort(key=lambda item: item.number)
    total = sum(len(item.boxes) if item.boxes else bool(item.sure) for item in found)
    if not total:
        what = "pixel is sure" if training.semantic else "box has this score"
        raise ConfigError(
            "pseudo_labels", f"{settings.pseudo_labels}, where no {what} on {len(images)} images", "a lower threshold"
        )
    if training.semantic:
        sure = 100 * sum(item.sure for item in found) / len(found)
        logger.info("pseudo-labels in %s: %.1f %% of the pixels, the others are ignored", folder.path / FOLDER, sure)
    else:
        content = json_of(found, images.paths, _root(images), training.categories)
        folder.write(f"{FOLDER}/boxes.json", to_json(content))
        some = sum(bool(item.boxes) for item in found)
        where = folder.path / FOLDER / "boxes.json"
        logger.info("pseudo-labels in %s: %d boxes on %d of %d images", where, total, some, len(images))
    folder.write(f"{FOLDER}/{MADE}", to_json({"threshold": settings.pseudo_labels, "images": len(images)}))
    fabric.barrier()


@torch.no_grad()
def _label(
    fabric: Fabric, settings: Settings, teacher: nn.Module, images: UnlabelledImages, training: Images,
    folder: RunFolder,
) -> list[Boxes]:  # fmt: skip
    """Return what the teacher predicts on this process's share; label maps are written at once."""
    rank, world = fabric.global_rank, fabric.world_size
    loader = evaluation_loader(images, batch_size=1, workers=settings.workers, rank=rank, world=world)
    files = label_files(images.folders, folder.path / FOLDER) if training.semantic else []
    teacher.to(fabric.device)
    found = []
    with evaluating(teacher):
        for batch, targets in loader:
            (image,), number = fabric.to_device(batch), targets[0]["image_id"]
            height, width = image.shape[-2:]
            if training.semantic:
                label, sure = _label_map(teacher, image, settings.pseudo_labels)
                with folder.writing(str(files[number].relative_to(folder.path))):
                    files[number].parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(files[number], _png(label))
                found.append(Boxes(number, width, height, sure=sure))
            else:
                (output,) = teacher([image])
                found.append(_boxes(output, number, (width, height), settings.pseudo_labels, training))
    return found


def _boxes(
    output: dict[str, Tensor], number: int, size: tuple[int, int], threshold: float, training: Images
) -> Boxes:  # fmt: skip
    boxes, labels, scores = (output[name].float().cpu().tolist() for name in ("boxes", "labels", "scores"))
    kept = [
        (x0, y0, x1, y1, int(label), score)
        for (x0, y0, x1, y1), label, score in zip(boxes, labels, scores)
        if score >= threshold and int(label) in training.categories and x1 > x0 and y1 > y0
    ]
    return Boxes(number, *size, boxes=kept)


def _label_map(teacher: nn.Module, image: Tensor, threshold: float) -> tuple[np.ndarray[Any, Any], float]:
    """Return the classes of all pixels, (H, W) uint8, and the part of them that is sure."""
    assert isinstance(teacher, Segmentor)
    logits = teacher.network(teacher.batch([image]))["out"].float()
    if logits.shape[2:] != image.shape[1:]:
        logits = F.interpolate(logits, image.shape[1:], mode="bilinear", align_corners=False)
    probability, label = logits[0].softmax(0).max(0)
    sure = probability >= threshold
    return label.where(sure, torch.full_like(label, IGNORED)).byte().cpu().numpy(), float(sure.float().mean())


def _png(label: np.ndarray[Any, Any]) -> bytes:
    """Encode a label map as a PNG with colours that can be looked at; the classes are its indices."""
    picture = Image.fromarray(label)
    picture.putpalette([(37 * k * (c + 3) + 90 * c) % 256 for k in range(255) for c in range(3)] + [255] * 3)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _root(images: UnlabelledImages) -> str:
    return os.path.commonpath([os.path.abspath(folder) for folder in images.folders])


def _load(settings: Settings, images: UnlabelledImages, training: Images, place: Path) -> list[Images]:
    """Load the files as all data is loaded, with all checks."""
    image_range, name = images.image_range, settings.student_name
    if not training.semantic:
        return [load_data(CocoSplit(str(place / "boxes.json"), _root(images), image_range), name, name=NAME)]
    classes = class_names(training.categories, training.num_classes)
    splits = [
        LabelSplit(folder, str(place / str(number)), classes, image_range)
        for number, folder in enumerate(images.folders)
    ]
    return [load_data(split, name, name=NAME, crop=settings.crop) for split in splits]
