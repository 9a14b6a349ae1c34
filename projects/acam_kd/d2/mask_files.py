"""Pictures of the masks of a Detectron2 run, from its checkpoints: where the distillation looks in an image.

Every image gives ``<name>_spatial.png`` and ``<name>_channel.png``. Several checkpoints of a run stand below each
other, so that one sees the masks move.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
from detectron2.config import CfgNode, get_cfg

from ..core.errors import RunError, one_line_errors
from ..report.panels import Array, channel_panel, mask_panel
from .config import add_distillation_config, merge
from .names import key
from .visualize import image_files, load_for_masks, load_moment, masks_of, read_rgb, strides_of

__all__ = ["draw", "moments", "panels", "write_masks"]

Masks = dict[str, dict[str, Array]]  # level -> kind -> masks


def moments(weights: Sequence[str]) -> list[str]:
    """Return a short name for every checkpoint: its file's, or its path where two files share theirs."""
    stems = [Path(path).stem for path in weights]
    return stems if len(set(stems)) == len(stems) else list(weights)


def draw(cfg: CfgNode, weights: Sequence[str], images: Sequence[Array]) -> list[dict[str, Array]]:
    """Draw, for each image, kind of mask -> picture."""
    model = load_for_masks(cfg, weights[0])
    seen: list[dict[str, Masks]] = [{} for _ in images]
    for number, moment in enumerate(moments(weights)):
        if number:
            load_moment(model, weights[number])
        for image, masks in zip(images, seen):
            masks[moment] = masks_of(model, cfg, image)
    return [panels(image, masks, strides_of(model, cfg, image)) for image, masks in zip(images, seen)]


def panels(image: Array, masks: dict[str, Masks], strides: dict[str, float]) -> dict[str, Array]:
    """Draw kind of mask -> picture from moment -> masks: the moments of a level, then those of the next."""
    rows: dict[str, dict[str, Array]] = {"spatial": {}, "channel": {}}
    pixels = {}
    for level, stride in strides.items():
        for moment, levels in masks.items():
            pixels[f"{level}, {moment}"] = stride
            for kind, values in levels.get(level, {}).items():  # of several methods one may have other levels
                rows[kind][f"{level}, {moment}"] = values
    drawn = {"spatial": mask_panel(image, rows["spatial"], pixels), "channel": channel_panel(rows["channel"])}
    return {kind: picture for kind, picture in drawn.items() if rows[kind]}


def write_masks(
    config_file: str, opts: Sequence[str], weights: Sequence[str], images: Sequence[str], output: Path
) -> None:
    """Read everything, draw, write, and print what was written.

    Args:
        config_file: the one in the run's folder.
        opts: pairs of KEY VALUE for the config.
        weights: checkpoints of the run, in the order to show them.
        images: files or folders.
        output: gets the pictures.

    Raises:
        SystemExit: something cannot be used, in one line in the words of the config.
    """
    with one_line_errors("acam-kd", key):
        cfg = get_cfg()
        add_distillation_config(cfg)
        merge(cfg, config_file, list(opts))
        files = image_files(list(images))
        pixels = [read_rgb(path) for path in files]
        output.mkdir(parents=True, exist_ok=True)
        for path, drawn in zip(files, draw(cfg, weights, pixels)):
            for kind, picture in drawn.items():
                target = output / f"{Path(path).stem}_{kind}.png"
                if not cv2.imwrite(str(target), picture[..., ::-1]):
                    raise RunError("cannot be written", where=str(target))
                print(target)
