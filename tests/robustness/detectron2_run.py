"""A tiny run of Detectron2's engine in a process of its own, with batches that are the same at the same iteration."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

try:
    import train_net
    from tests.d2.conftest import detector_config, distillation_config, save_config
    from tests.d2.test_train import FixedOrder
except ImportError:  # without Detectron2 the tests that need this are skipped
    pass


def files(folder: Path, data: Path) -> list[str]:
    """Write the configs of a tiny run, and return the arguments of train_net.py."""
    student = detector_config("Base-RetinaNet.yaml", "MODEL.RETINANET.NUM_CLASSES", 6)
    save_config(student, folder / "teacher.yaml")
    cfg = distillation_config(
        student, "teacher.yaml", "DATASETS.TRAIN", "('own_train',)", "DATASETS.TEST", "('own_val',)",
        "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 6, "SOLVER.STEPS", "(3,)", "SOLVER.BASE_LR", 0.001,
        "SOLVER.CHECKPOINT_PERIOD", 1, "DISTILL.LOG_PERIOD", 2, "SEED", 3, "DISTILL.TEACHER.CHECK", False,
        "DISTILL.METHOD", "PKD",
    )  # fmt: skip
    return [
        "--resume", "--config-file", save_config(cfg, folder / "run.yaml"),
        "--dataset", "own_train", str(data / "train.json"), str(data / "train"),
        "--dataset", "own_val", str(data / "val.json"), str(data / "val"),
    ]  # fmt: skip


def run(log: Path, arguments: list[str], fixed: bool = True) -> None:
    """Train as train_net.py does, with its words in a file; the target of a process.

    Args:
        log: gets what is printed.
        arguments: of the command.
        fixed: have the same batch at the same iteration; else the dataset's images, from the config's loader.
    """
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    made = train_net.Trainer.__init__

    def init(self, cfg):
        made(self, cfg)
        self._trainer.data_loader = FixedOrder(self)

    if fixed:
        train_net.Trainer.__init__ = init
    train(arguments)


def train(arguments: list[str]) -> None:
    """Train as train_net.py does."""
    train_net.main(train_net.parser().parse_args(arguments))
