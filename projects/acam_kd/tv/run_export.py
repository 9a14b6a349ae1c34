"""The export of a run's student, with the images that it is checked on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..core.errors import ConfigError
from ..data.folders import ClassSplit, list_images
from ..export.checked import CHECKED, Comparison, export_model
from ..export.exported import Metadata, as_pixels
from ..report.media import IMAGES, media_files, read_image
from ..report.samples import spread
from .card import Card
from .classification import Classifier
from .deployed import Deployed
from .predict import CHECKPOINTS, load_student
from .segmentation import Segmentor

__all__ = ["export_run", "images_of"]


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

    Args:
        run: the folder.
        path: the file.
        kind: see ``export_model``.
        checkpoint: one of ``CHECKPOINTS``.
        size: the shorter side that images are resized to inside; None for the run's.
        images: files and folders to check with; none for validation images of the run.
    """
    model, card = load_student(run, checkpoint=checkpoint, size=size)
    files = media_files(images, suffixes=IMAGES)[:CHECKED] if images else images_of(run)
    pixels = [as_pixels(read_image(file)) for file in files]
    deployed = Deployed(model)
    own = model.size if isinstance(model, Classifier) else card.size
    metadata = _metadata(run, card, deployed, size or own, CHECKPOINTS[checkpoint])
    return export_model(deployed, metadata, pixels, path, kind=kind)


def images_of(run: str, count: int = CHECKED) -> list[Path]:
    """Return a few of a run's validation images, those with the most objects first.

    Raises:
        ConfigError: they are not there any more.
    """
    split = _settings(run).get("val_split", {})
    root, found = Path(split.get("image_root", "")), list[Path]()
    json_file = Path(split.get("json_file", ""))
    if json_file.is_file():
        content = json.loads(json_file.read_text(encoding="utf-8-sig"))
        objects: dict[Any, int] = {}
        for annotation in content.get("annotations", []):
            objects[annotation.get("image_id")] = objects.get(annotation.get("image_id"), 0) + 1
        entries = sorted(content.get("images", []), key=lambda entry: -objects.get(entry["id"], 0))
        found = [root / entry["file_name"] for entry in entries]
    elif split.keys() == ClassSplit.__dataclass_fields__.keys() and root.exists():
        files = list_images(ClassSplit(**split)).files
        found = [Path(files[index]) for index in spread(len(files), count)]
    elif split and root.is_dir():
        found = sorted(file for file in root.iterdir() if file.suffix.lower() in IMAGES)
    found = [file for file in found[: 10 * count] if file.is_file()][:count]
    if not found:
        raise ConfigError("images", f"none: the validation images of {run} are gone", "image files", "give {images}")
    return found


def _settings(run: str) -> dict[str, Any]:
    path = Path(run) / "settings.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _metadata(run: str, card: Card, deployed: Deployed, size: int | None, weights: str) -> Metadata:
    settings = _settings(run)
    mean, std = _statistics(deployed.model)
    return Metadata(
        card.name, deployed.outputs, card.categories, card.num_classes, size, mean, std,
        method=settings.get("method", ""), teacher=Path(settings.get("teacher", "")).name, weights=weights,
    )  # fmt: skip


def _statistics(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    owner: Any = model if isinstance(model, (Segmentor, Classifier)) else model.transform
    return tuple(owner.image_mean), tuple(owner.image_std)
