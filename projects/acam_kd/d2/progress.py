"""The progress line of a Detectron2 run on a terminal; elsewhere Detectron2's own lines stay."""

from __future__ import annotations

import logging
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from ..report.progress import Progress

__all__ = ["ProgressLine", "progress_line"]

EVENTS = "detectron2.utils.events"
"""The logger of Detectron2's ``CommonMetricPrinter``."""
LOGGERS = ("detectron2", "fvcore", "acam_kd")
"""The loggers that write on the terminal."""


def progress_line(trainer: Any, metric: str) -> list[HookBase]:
    """Return the hook of the line for a DefaultTrainer; none if this process has no terminal.

    Args:
        trainer: has ``cfg`` and ``max_iter``.
        metric: the name of the one that the line shows, as ``"bbox/AP"``; empty for none.
    """
    cfg = trainer.cfg
    more = cfg.DISTILL.UNLABELLED.BATCH if cfg.DATASETS.UNLABELLED else 0
    progress = Progress(
        trainer.max_iter, cfg.SOLVER.IMS_PER_BATCH, unlabelled=more, shown=comm.is_main_process(), loggers=LOGGERS
    )
    return [ProgressLine(progress, metric)] if progress.live else []


class ProgressLine(HookBase):
    """One line with time left, losses and the last metric.

    The lines of Detectron2's ``CommonMetricPrinter`` are kept from the terminal meanwhile; its log file has them.

    Args:
        progress: the line.
        metric: the name of the metric in the event storage; empty for none.
    """

    def __init__(self, progress: Progress, metric: str) -> None:
        self.progress, self.metric = progress, metric
        self._handlers: list[logging.Handler] = []

    def before_train(self) -> None:
        """Take the terminal."""
        self.progress.__enter__()
        handlers = [handler for name in (None, *LOGGERS) for handler in logging.getLogger(name).handlers]
        self._handlers = [handler for handler in handlers if _is_terminal(handler)]
        for handler in self._handlers:
            handler.addFilter(_no_events)

    def before_step(self) -> None:
        """Begin to measure a step, after the hooks of the last one."""
        self.progress.start()

    def after_step(self) -> None:
        """Draw the line anew, a few times a second."""
        self.progress.count()
        if not self.progress.due():
            return
        latest = self.trainer.storage.latest()
        if self.metric in latest:
            value, step = latest[self.metric]
            self.progress.metrics = f"{self.metric} {value:.2f} at {step + 1}"
        losses = {name: value for name, (value, _) in latest.items() if "loss" in name and "/" not in name}
        total = {"loss": losses.pop("total_loss")} if "total_loss" in losses else {}
        rate, _ = latest.get("lr", (0.0, 0))
        self.progress.draw(self.progress.text(self.trainer.iter + 1, {**total, **losses}, rate=rate))

    def after_train(self) -> None:
        """Give the terminal back, after an error too."""
        self.progress.__exit__()
        for handler in self._handlers:
            handler.removeFilter(_no_events)


def _is_terminal(handler: logging.Handler) -> bool:
    if not isinstance(handler, logging.StreamHandler) or getattr(handler.stream, "closed", False):
        return False  # a closed stream, as of a handler that another part of the program left, cannot be asked
    return bool(getattr(handler.stream, "isatty", bool)())


def _no_events(record: logging.LogRecord) -> bool:
    return record.name != EVENTS
