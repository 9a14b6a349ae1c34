"""The export of a Detectron2 run's student, checked on images of several sizes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

from ..core.errors import ConfigError
from ..export.checked import CHECKED, Comparison, export_model
from ..export.exported import Metadata, as_pixels
from ..report.media import IMAGES, media_files, read_image
from .config_files import read_config
from .deployed import DeployedD2
from .runs import load_run, read_classes

__all__ = ["export_run"]

logger = logging.getLogger("acam_kd")


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

    The file takes images that are resized already; its metadata says to which size.

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
    if cfg.MODEL.KEYPOINT_ON:
        logger.warning("the file will have boxes, scores and labels only: keypoints are not exported")
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
