"""The best checkpoint of a run, and the moving average of the student's weights, as hooks of Detectron2's trainer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from ..core.average import Average
from ..core.errors import ConfigError
from ..files import to_json, write_atomically
from ..json_file import read_json

__all__ = ["main_metric", "with_best"]

AUTO = "auto"
METRICS = {"coco": "bbox/AP", "sem_seg": "sem_seg/mIoU"}
"""The ``evaluator_type`` of a dataset -> its main metric."""


def with_best(trainer: Any, built: Sequence[HookBase | None]) -> list[HookBase | None]:
    """Add the hooks of the average and of the best checkpoint to those of a DefaultTrainer.

    Args:
        trainer: has ``cfg``, ``model`` and ``checkpointer``.
        built: its hooks so far.

    Raises:
        ConfigError: DISTILL.EMA is no decay.
    """
    cfg = trainer.cfg
    if not 0 <= cfg.DISTILL.EMA < 1:
        raise ConfigError("DISTILL.EMA", cfg.DISTILL.EMA, "a number from 0, and below 1")
    average = Average(trainer.checkpointer.model, cfg.DISTILL.EMA)
    saver, metric = _Saver(trainer.checkpointer, average), main_metric(cfg)
    found: list[HookBase | None] = []
    for hook in built:
        if isinstance(hook, hooks.EvalHook) and average.decay:
            hook._func = _averaged(hook._func, average)
        found.append(hook)
        if isinstance(hook, hooks.EvalHook) and metric and comm.is_main_process():
            found.append(_Best(cfg.TEST.EVAL_PERIOD, saver, metric))
    if average.decay:
        trainer.checkpointer.add_checkpointable("average", average)
        found.insert(1, _Averaging(average, saver))  # before the checkpoints
    return found


def main_metric(cfg: CfgNode) -> str:
    """Return the name of the metric that says which checkpoint is the best; empty if none does."""
    if cfg.DISTILL.BEST != AUTO:
        return str(cfg.DISTILL.BEST)
    if cfg.TEST.EVAL_PERIOD <= 0 or len(cfg.DATASETS.TEST) != 1:
        return ""
    return METRICS.get(MetadataCatalog.get(cfg.DATASETS.TEST[0]).get("evaluator_type", ""), "")


def _averaged(function: Any, average: Average) -> Any:
    def evaluate() -> Any:
        with average.applied():
            return function()

    return evaluate


class _Saver:
    """A checkpointer that saves the averaged weights, and leaves alone which checkpoint a run resumes from."""

    def __init__(self, checkpointer: Any, average: Average) -> None:
        self.checkpointer, self.average = checkpointer, average
        self.folder = Path(checkpointer.save_dir)

    def save(self, name: str, **state: Any) -> None:
        self.checkpointer.tag_last_checkpoint = lambda _: None  # a run that is killed here resumes from another one
        try:
            with self.average.applied():
                self.checkpointer.save(name, **state)
        finally:
            del self.checkpointer.tag_last_checkpoint


class _Averaging(HookBase):
    """The updates of the average; at the end the averaged weights go to a file of their own."""

    def __init__(self, average: Average, saver: _Saver) -> None:
        self.average, self.saver = average, saver

    def before_train(self) -> None:
        if not self.average.updates:  # the weights may have been loaded since
            self.average.restart()

    def after_step(self) -> None:
        self.average.update()

    def after_train(self) -> None:
        if self.trainer.iter + 1 >= self.trainer.max_iter and comm.is_main_process():
            self.saver.save("model_average")


class _Best(hooks.BestCheckpointer):
    """Detectron2's hook, which also writes its metric to ``best.json`` and knows it again in a resumed run."""

    def __init__(self, period: int, saver: _Saver, metric: str) -> None:
        super().__init__(period, saver, metric)  # type: ignore[arg-type]
        self._path = saver.folder / "best.json"

    def before_train(self) -> None:
        if not self._path.is_file():
            return
        found = read_json(self._path, ("metric", "value", "iteration"))
        if found["metric"] == self._val_metric and found["iteration"] < self.trainer.start_iter:
            self.best_metric, self.best_iter = found["value"], found["iteration"]

    def _update_best(self, val: float, iteration: int) -> bool:
        iteration = min(iteration, self.trainer.max_iter - 1)  # the last evaluation is made after the loop's count
        updated = super()._update_best(val, iteration)
        if updated:
            os.makedirs(self._path.parent, exist_ok=True)
            content = {"metric": self._val_metric, "value": val, "iteration": iteration}
            write_atomically(self._path, to_json(content, indent=1))
        return bool(updated)
