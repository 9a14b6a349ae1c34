"""Runs of train_net.py: whole ones, and such that end early and see the same batches again."""

from __future__ import annotations

import pytest
import torch
from detectron2.engine import HookBase

import train_net

from .conftest import inputs

CHEAPER = ["DISTILL.PERIOD", 3, "DISTILL.CHANNELS_LAST", True, "DISTILL.TEACHER.PRECISION", "bfloat16"]


def run(command):
    return train_net.main(train_net.parser().parse_args(command))


class FixedOrder:
    """The same batch, and the same random numbers, at the same iteration, whenever the run was started."""

    def __init__(self, trainer):
        self.trainer = trainer

    def __iter__(self):
        while True:
            torch.manual_seed(self.trainer.iter)
            batch = inputs()
            for x in batch:
                x["image"] = (x["image"] + self.trainer.iter).to(torch.uint8)
            yield batch


def train(command, until=None):
    args = train_net.parser().parse_args(command)
    cfg = train_net.setup(args)
    trainer = train_net.Trainer(cfg)
    trainer._trainer.data_loader = FixedOrder(trainer)
    trainer.resume_or_load(resume=args.resume)
    trainer._hooks = [h for h in trainer._hooks if type(h).__name__ != "EvalHook"]
    if until is None:
        trainer.train()
    else:
        trainer.register_hooks([Kill(until)])
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    return trainer


class Kill(HookBase):
    """Ends a run after so many iterations."""

    def __init__(self, iterations):
        self.iterations = iterations

    def after_step(self):
        if self.trainer.iter + 1 == self.iterations:
            raise KeyboardInterrupt
