#!/usr/bin/env python
"""Pictures of the masks of a Detectron2 run: where the distillation looks in an image.

    python tools/visualize_masks.py --config-file output/config.yaml \\
        --weights output/model_0004999.pth output/model_final.pth --images a.jpg b.jpg --output output/masks

Every image gives ``<name>_spatial.png`` and ``<name>_channel.png``. Several checkpoints of a run stand below each
other, so that one sees the masks move. The config file is the one in the run's output folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import cv2
from detectron2.config import CfgNode, get_cfg

from acam_kd.core.errors import one_line_errors
from acam_kd.d2 import add_distillation_config
from acam_kd.d2.config import merge
from acam_kd.d2.names import key
from acam_kd.d2.visualize import image_files, load_for_masks, load_moment, masks_of, read_rgb, strides_of
from acam_kd.vis.panels import Array, channel_panel, mask_panel

Masks = dict[str, dict[str, Array]]  # level -> kind -> masks


def moments(weights: Sequence[str]) -> list[str]:
    """Return a short name for every checkpoint: its file's, or its path where two files share theirs."""
    stems = [Path(path).stem for path in weights]
    return stems if len(set(stems)) == len(stems) else list(weights)


def draw(cfg: CfgNode, weights: Sequence[str], images: Sequence[Array]) -> list[dict[str, Array]]:
    """Per image: kind of mask -> picture."""
    model = load_for_masks(cfg, weights[0])
    seen: list[dict[str, Masks]] = [{} for _ in images]
    for number, moment in enumerate(moments(weights)):
        if number:
            load_moment(model, weights[number])
        for image, masks in zip(images, seen):
            masks[moment] = masks_of(model, cfg, image)
    return [panels(image, masks, strides_of(model, cfg, image)) for image, masks in zip(images, seen)]


def panels(image: Array, masks: dict[str, Masks], strides: dict[str, float]) -> dict[str, Array]:
    """Kind of mask -> picture, from moment -> masks: the moments of a level, then those of the next."""
    rows: dict[str, dict[str, Array]] = {"spatial": {}, "channel": {}}
    pixels = {}
    for level, stride in strides.items():
        for moment, levels in masks.items():
            pixels[f"{level}, {moment}"] = stride
            for kind, values in levels.get(level, {}).items():  # of several methods one may have other levels
                rows[kind][f"{level}, {moment}"] = values
    drawn = {"spatial": mask_panel(image, rows["spatial"], pixels), "channel": channel_panel(rows["channel"])}
    return {kind: picture for kind, picture in drawn.items() if rows[kind]}


def run(args: argparse.Namespace) -> None:
    """Read everything, draw, write, and print what was written."""
    cfg = get_cfg()
    add_distillation_config(cfg)
    merge(cfg, args.config_file, args.opts)
    files = image_files(args.images)
    images = [read_rgb(path) for path in files]
    args.output.mkdir(parents=True, exist_ok=True)
    for path, drawn in zip(files, draw(cfg, args.weights, images)):
        for kind, picture in drawn.items():
            target = args.output / f"{Path(path).stem}_{kind}.png"
            if not cv2.imwrite(str(target), picture[..., ::-1]):
                raise SystemExit(f"visualize_masks.py: {target} cannot be written")
            print(target)


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    built = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    built.add_argument("--config-file", required=True, help="the run's config")
    built.add_argument("--weights", required=True, nargs="+", help="checkpoints of the run, in the order to show them")
    built.add_argument("--images", required=True, nargs="+", help="image files or folders")
    built.add_argument("--output", required=True, type=Path, help="folder for the pictures")
    built.add_argument("opts", nargs="*", help="after --output: KEY VALUE pairs for the config, as MODEL.DEVICE cpu")
    return built


if __name__ == "__main__":
    with one_line_errors("visualize_masks.py", key):
        run(parser().parse_args())
