"""The command ``acam-kd``: distil, evaluate and show torchvision models, with nothing but pip.

acam-kd shapes --output datasets
acam-kd train --data datasets/shapes_160_0 --student fcos_resnet18_fpn --output output/teacher
acam-kd train --data datasets/shapes_160_0 --student fcos_mobilenet_v3_small_fpn --teacher output/teacher --output output/acam
acam-kd eval --data datasets/shapes_160_0 --student output/acam
acam-kd predict output/acam datasets/shapes_160_0/val --output output/predictions
acam-kd export output/acam --format onnx --output output/acam.onnx
acam-kd check datasets/shapes_160_0
acam-kd compare --plan PLAN.yaml --output output/compare
acam-kd demo
"""  # noqa: E501

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

import acam_kd

from ..core.errors import ConfigError, one_line_errors
from ..core.interrupts import one_line_interruption
from . import check, compare, crops, demo, doctor, evaluate, export, masks, predict, shapes, train
from .command import Parser
from .train import train_settings

__all__ = ["main", "train_settings"]

COMMANDS = tuple(
    module.COMMAND for module in (train, doctor, evaluate, predict, export, check, compare, demo, shapes, crops, masks)
)
TOKENS_COMMAND = ConfigError(
    "command", "tokens", "train --method MasKD or FreeKD, which learns the tokens itself",
    "--set tokens=FILE keeps them in a file for other runs; see docs/migration.md",
)  # fmt: skip
"""The error for a command of version 0.1 that is gone."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; bad input ends it with one line and a non-zero status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments[:1]) == ["tokens"]:
        raise SystemExit(f"acam-kd: {TOKENS_COMMAND}")
    args = _parser().parse_args(arguments)
    command = args.command
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # with several devices this runs once for each
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s", force=True)
    with one_line_interruption("acam-kd", command.again), one_line_errors("acam-kd", command.names):
        command.run(command.values(args))


def _parser() -> Parser:
    parser = Parser("acam-kd", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"acam-kd {acam_kd.__version__}")
    commands = parser.add_subparsers(required=True, metavar=" | ".join(command.name for command in COMMANDS))
    for command in COMMANDS:
        command.add_to(commands)
    return parser
