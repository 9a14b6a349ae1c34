#!/usr/bin/env python
"""The first stage of MasKD and FreeKD: their tokens, or prompts, learnt on the teacher of a distillation.

    python tools/learn_tokens.py --config-file configs/my_maskd.yaml --output output/tokens.pth
    python train_net.py --config-file configs/my_maskd.yaml DISTILL.MASKD.TOKENS output/tokens.pth

The config is that of the distillation: a pair of detectors and a file of configs/methods. The tool runs on one device,
with SOLVER.IMS_PER_BATCH images a step. The teacher is not changed.
"""

from __future__ import annotations

import argparse
import logging

from detectron2.config import CfgNode, get_cfg

from acam_kd.core import read_methods
from acam_kd.core.errors import ConfigError, one_line_errors
from acam_kd.d2 import add_dataset_options, add_distillation_config, register_datasets
from acam_kd.d2.names import key
from acam_kd.d2.token_learning import learn
from acam_kd.methods.parts.token_files import TOKEN_METHODS

OPTIONS = {"config_file": "--config-file", "opts": "KEY VALUE"}
"""The name of an argument in messages -> the option; other arguments are keys of the config."""


def run(args: argparse.Namespace) -> None:
    """Read the config, learn the tokens, write them, and print the file's name."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    cfg = _config(args)
    cfg.DATASETS.COCO_FORMAT = [*cfg.DATASETS.COCO_FORMAT, *args.dataset]
    cfg.DATASETS.SEM_SEG = [*cfg.DATASETS.SEM_SEG, *args.sem_seg_dataset]
    cfg.DATASETS.TEST = ()
    register_datasets(cfg, training=True)
    asked = [name for name in read_methods(cfg.DISTILL.METHOD) if name in TOKEN_METHODS]
    method = args.method or (asked or TOKEN_METHODS)[0]
    learn(cfg, method, args.output, iterations=args.iterations, learning_rate=args.lr)
    print(f"{args.output}: for DISTILL.{method.upper()}.TOKENS")


def _config(args: argparse.Namespace) -> CfgNode:
    cfg = get_cfg()
    add_distillation_config(cfg)
    try:
        cfg.merge_from_file(args.config_file)
    except ConfigError:
        raise
    except (OSError, KeyError, ValueError, AssertionError) as error:
        raise ConfigError("config_file", f"{args.config_file} ({_reason(error)})", allowed="a config") from error
    try:
        cfg.merge_from_list(args.opts)
    except (KeyError, ValueError, AssertionError) as error:
        value = f"{' '.join(args.opts)} ({_reason(error)})"
        raise ConfigError("opts", value, allowed="keys of the config, each with a value of its type") from error
    return cfg


def _reason(error: Exception) -> str:
    """Return the message in one line. A KeyError would put it in quotes."""
    message = error.args[0] if isinstance(error, KeyError) else error
    return " ".join(str(message).split())


def parser() -> argparse.ArgumentParser:
    """Build the parser of the options."""
    built = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    built.add_argument("--config-file", required=True, help="config of the distillation")
    built.add_argument("--output", required=True, help="file for the tokens")
    built.add_argument("--method", choices=TOKEN_METHODS, help="whose tokens; default: the config's, else MasKD")
    built.add_argument("--iterations", type=_positive, default=2000, help="steps (default: %(default)s)")
    built.add_argument("--lr", type=float, default=0.01, help="of Adam; a cosine lowers it (default: %(default)s)")
    add_dataset_options(built)
    built.add_argument("opts", nargs="*", help="KEY VALUE pairs for the config, as SOLVER.IMS_PER_BATCH 4")
    return built


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {value}, expected at least 1")
    return value


if __name__ == "__main__":
    with one_line_errors("learn_tokens.py", lambda name: OPTIONS.get(name) or key(name)):
        run(parser().parse_args())
