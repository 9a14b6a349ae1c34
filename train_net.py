#!/usr/bin/env python
"""Train or evaluate a distilled detector with Detectron2.

    python train_net.py --config-file configs/acam_r50_r101.yaml --num-gpus 8
    python train_net.py --config-file configs/acam_r50_r101.yaml --eval-only MODEL.WEIGHTS output/model_final.pth

It is Detectron2's DefaultTrainer, with all of its options, and a student with a distillation attached.
"""

from acam_kd.d2.train import Trainer, main, parser, run, setup

__all__ = ["Trainer", "main", "parser", "setup"]

if __name__ == "__main__":
    run()
