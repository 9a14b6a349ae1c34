"""The runs of the demo: which engine makes them, and several of them at once."""

from __future__ import annotations

import importlib
import itertools
import logging
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..core.errors import ConfigError
from ..core.interrupts import Interrupted, PassedOn
from .plans import Plan

__all__ = ["ENGINES", "Engine", "Run", "load_engine", "make_all"]

logger = logging.getLogger("acam_kd")

ENGINES = {"torchvision": "acam_kd.tv.demo", "detectron2": "acam_kd.d2.demo"}


class Engine(Protocol):
    """The interface of the modules ``tv.demo`` and ``d2.demo``."""

    DESCRIPTION: str
    AT_ONCE: int
    """The number of runs that a CPU makes at once, each in a process with its share of the threads."""
    USES_GPU: bool
    """Runs go to a GPU where there is one."""

    def run(self, plan: Plan, folder: Path, *, data: Path, teacher: Path, seed: int, watched: Sequence[str]) -> None:
        """Train and evaluate, or resume; a complete run is left alone.

        ``folder`` gets these files, besides those that the engine itself needs:

        - ``result.json``: ``metrics``, ``seconds``, ``parameters``, ``versions``, ``device``, ``date``. It marks a
          complete run.
        - ``metrics.jsonl``: lines with ``step`` and losses or metrics.
        - ``predictions.json``: COCO's results format.
        - the files of ``keep_masks``, for the watched images at several moments.
        """


def load_engine(name: str) -> Engine:
    """Import an engine's half of the demo.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(ENGINES[name])  # type: ignore[return-value]
    except ImportError as error:
        raise ConfigError(
            "engine",
            f"{name}, which cannot be imported ({error})",
            allowed="an engine that is installed",
            hint="see docs/install.md, or choose another {engine}",
        ) from error


@dataclass(frozen=True)
class Run:
    """A training of the demo.

    Args:
        engine: a key of ``ENGINES``.
        place: among all of them, for people.
        plan, folder, given: see ``Engine.run``.
    """

    engine: str
    place: str
    plan: Plan
    folder: Path
    given: dict[str, Any]

    def make(self) -> None:
        """Make it, or resume it."""
        logger.info("== %s: %s, seed %d (%s) ==", self.place, self.plan.name, self.given["seed"], self.folder)
        load_engine(self.engine).run(self.plan, self.folder, **self.given)

    def make_beside_others(self, threads: int) -> None:
        """Make it in a process of its own, whose lines name it."""
        torch.set_num_threads(threads)
        logging.basicConfig(level=logging.INFO, format=f"{self.plan.name}: %(message)s", force=True)
        self.make()


def make_all(runs: Sequence[Run], at_once: int) -> None:
    """Make runs, some of them at once.

    Raises:
        Interrupted: at a signal, after the runs at work have saved what they have.
    """
    if at_once == 1:
        for run in runs:
            run.make()
        return
    threads, spawn = torch.get_num_threads() // at_once, multiprocessing.get_context("spawn")
    waiting, at_work = iter(runs), set[Future[None]]()
    with PassedOn() as signals, ProcessPoolExecutor(at_once, spawn) as pool:
        while not signals.received:  # none is handed in ahead: the pool would begin it after a signal or an error
            free = itertools.islice(waiting, at_once - len(at_work))
            at_work |= {pool.submit(run.make_beside_others, threads) for run in free}
            if not at_work:
                return
            done, at_work = wait(at_work, return_when=FIRST_COMPLETED)
            if not signals.received:
                for future in done:
                    future.result()
    raise Interrupted("each run kept its last checkpoint", signals.received)
