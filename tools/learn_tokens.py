#!/usr/bin/env python
"""Learn the tokens of MasKD, or the prompts of FreeKD, on the teacher of a distillation: their first stage.

    python tools/learn_tokens.py --config-file configs/my_maskd.yaml --output output/tokens.pth
    python train_net.py --config-file configs/my_maskd.yaml DISTILL.MASKD.TOKENS output/tokens.pth

where the config is that of the distillation: a pair of detectors and a file of configs/methods. It runs on one device;
SOLVER.IMS_PER_BATCH is how many images that sees at a time. The teacher is not changed.
"""

from __future__ import annotations

import argparse
import logging

import yacs
from detectron2.config import get_cfg

from acam_kd.core import read_methods
from acam_kd.core.token_files import TOKEN_METHODS
from acam_kd.d2 import add_dataset_options, add_distillation_config, register_datasets
from acam_kd.d2.token_learning import learn
from acam_kd.core.errors import one_line_errors


def run(args: argparse.Namespace) -> None:
    """Read the config, learn, write, and print what was written."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    cfg = get_cfg()
    add_distillation_config(cfg)
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.DATASETS.COCO_FORMAT = [*cfg.DATASETS.COCO_FORMAT, *args.dataset]
    cfg.DATASETS.SEM_SEG = [*cfg.DATASETS.SEM_SEG, *args.sem_seg_dataset]
    cfg.DATASETS.TEST = ()
    register_datasets(cfg, training=True)
    asked = [name for name in read_methods(cfg.DISTILL.METHOD) if name in TOKEN_METHODS]
    method = args.method or (asked or TOKEN_METHODS)[0]
    learn(cfg, method, args.output, iterations=args.iterations, learning_rate=args.lr)
    print(f"{args.output}: for DISTILL.{method.upper()}.TOKENS")


def parser() -> argparse.ArgumentParser:
    """The options."""
    built = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    built.add_argument("--config-file", required=True, help="of the distillation")
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
        raise argparse.ArgumentTypeError(f"must be at least 1, found {value}")
    return value


if __name__ == "__main__":
    with one_line_errors("learn_tokens.py", yacs):
        run(parser().parse_args())
