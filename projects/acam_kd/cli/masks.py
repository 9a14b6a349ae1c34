"""``acam-kd masks``: pictures of the masks of a Detectron2 run."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import ConfigError
from ..fields import instance, option
from .command import Command, Values

__all__ = ["COMMAND"]


@dataclass(frozen=True)
class Masks:
    """The options of the pictures."""

    config_file: str = option(metavar="FILE", help="the run's config.yaml")
    weights: tuple[str, ...] = option(
        nargs="+", action="extend", metavar="FILE", help="checkpoints of the run, in the order to show them"
    )
    images: tuple[str, ...] = option(nargs="+", action="extend", metavar="PATH", help="image files or folders")
    output: Path = option(type=Path, metavar="FOLDER", help="folder for the pictures")
    opts: tuple[str, ...] = option(
        (), flag="KEY VALUE", nargs="*", metavar="KEY VALUE", help="last of all: for the config, as MODEL.DEVICE cpu"
    )


def run(values: Values) -> None:
    """Write the pictures.

    Raises:
        ConfigError: Detectron2 is not installed.
        SystemExit: config, weights or images cannot be used.
    """
    asked = instance(Masks, values)
    try:
        files = importlib.import_module("..d2.mask_files", __package__)
    except ImportError as error:
        raise ConfigError(
            "command",
            f"masks, for which Detectron2 cannot be imported ({error})",
            allowed="Detectron2 to be installed",
            hint="see Set-up in README.md",
        ) from error
    files.write_masks(asked.config_file, asked.opts, asked.weights, asked.images, asked.output)


COMMAND = Command(
    "masks",
    "draw the masks of a Detectron2 run",
    run,
    (Masks,),
    "acam-kd masks --config-file output/config.yaml --weights output/model_final.pth --images a.jpg --output masks",
)
