"""The early end of a Detectron2 run, by a signal or an error: the last whole step is saved."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.utils import comm
from torch.utils.data import DataLoader

from ..core.errors import ConfigError, RunError
from ..core.interrupts import Interrupted, Signals, leave_to_parent
from ..core.lost import lost_process
from .names import key

__all__ = ["saving_what_is_done", "with_quiet_workers"]

logger = logging.getLogger("detectron2.acam_kd")


@contextmanager
def saving_what_is_done(trainer: DefaultTrainer, signals: Signals) -> Iterator[None]:
    """Let a signal end the training after a whole step, and save that step however the training ends early.

    All processes end after the same step, and the first one writes the checkpoint. An evaluation ends at once, and a
    resumed run repeats only the last one. A step that failed is not saved.

    Args:
        trainer: trains within the context; it gets a hook.
        signals: entered.

    Raises:
        Interrupted: at a signal; it says where the checkpoint is.
    """
    steps = _Steps(trainer, signals)
    trainer_logger = logging.getLogger("detectron2.engine.train_loop")
    trainer_logger.addFilter(_without_traceback)
    try:
        with signals.together(True):
            yield
        if steps.cut_short:
            signals.stop()
    except BaseException as error:
        kept = steps.save()
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted.of(error, kept) from None
        if kept:
            logger.info("%s", kept)
        raise
    finally:
        trainer_logger.removeFilter(_without_traceback)


class _Steps(HookBase):
    """A hook that knows the last whole step; it ends the run there after a signal.

    A step begins with its batch and ends before the evaluation, where Detectron2 writes its periodic checkpoints too.

    Args:
        trainer: gets this hook.
        signals: noted until the end of a step.
    """

    def __init__(self, trainer: DefaultTrainer, signals: Signals) -> None:
        self.signals, self.checkpointer = signals, trainer.checkpointer
        self.done = self.saved = -1
        self.cut_short = False
        """The last evaluation, after the last step, was ended by a signal."""
        trainer.register_hooks([self])
        before: list[HookBase] = trainer._hooks
        before.remove(self)
        evaluations = [hook for hook in before if isinstance(hook, hooks.EvalHook)]
        before.insert(before.index(evaluations[0]) if evaluations else len(before), self)
        for hook in evaluations:
            hook._func = partial(self._evaluate, hook._func)
        trainer._trainer.data_loader = _Batches(trainer._trainer.data_loader, signals)

    def before_train(self) -> None:
        self.done = self.saved = self.trainer.start_iter - 1

    def after_step(self) -> None:
        trainer = self.trainer
        self.done = trainer.iter
        if (self.done + 1) % trainer.cfg.SOLVER.CHECKPOINT_PERIOD == 0 or self.done + 1 == trainer.max_iter:
            self.saved = self.done  # by Detectron2's own hook
        number = _largest(self.signals.received, next(trainer.model.parameters()).device)
        self.signals.within_step = False
        if number:
            self.save()
            comm.synchronize()
            self.signals.stop(number)

    def save(self) -> str:
        """Save the last whole step unless that was done; return a sentence on the last checkpoint, if there is one."""
        if self.done > self.saved and not self.signals.within_step:
            self.trainer.iter = self.done  # the next one may have begun
            try:
                if comm.is_main_process():
                    self.checkpointer.save(f"model_{self.done:07d}", iteration=self.done)
                self.saved = self.done
            except RunError as failure:  # as on a full disk, which may be what ended the run
                logger.warning("step %d is not saved: %s", self.done + 1, failure.render(key))
        if self.saved < 0:
            return ""
        return f"{self.checkpointer.get_checkpoint_file()} holds step {self.saved + 1} of {self.trainer.max_iter}"

    def _evaluate(self, function: Callable[[], Any]) -> Any:
        """Evaluate; a signal ends that at once, after the last step by way of the hooks that come later."""
        if self.signals.received:
            return None
        try:
            with self.signals.together(False):
                return function()
        except Interrupted:
            if self.trainer.iter < self.trainer.max_iter:
                raise
            self.cut_short = True
            return None


class _Batches:
    """The batches of a loader; each one begins a step."""

    def __init__(self, loader: Any, signals: Signals) -> None:
        self.loader, self.signals = loader, signals

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            self.signals.within_step = True
            yield batch


def _largest(number: int, device: torch.device) -> int:
    """Return the largest of all processes' numbers."""
    if comm.get_world_size() == 1:
        return number
    found = torch.tensor(number, device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return int(found)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Let Detectron2's trainer log an error of one line as one line."""
    error = record.exc_info[1] if record.exc_info else None
    if error is not None and (found := lost_process(error) or error) and isinstance(found, (ConfigError, RunError)):
        record.exc_info = None
        record.msg, record.args = "The training ends early: %s", (found.render(key),)
    return True


def with_quiet_workers(loader: Any) -> Any:
    """Let the workers of a Detectron2 loader leave signals to their parent; see ``leave_to_parent``."""
    inner = loader
    while inner is not None and not isinstance(inner, DataLoader):
        inner = getattr(inner, "dataset", getattr(inner, "_dataset", None))
    if inner is not None:
        inner.worker_init_fn = partial(_start_worker, inner.worker_init_fn)
    return loader


def _start_worker(before: Callable[[int], None] | None, number: int) -> None:
    leave_to_parent()
    if before is not None:
        before(number)
