"""The demo: a teacher, and one student trained in four ways, on shapes that are drawn on demand.

Both engines fill the same folder, table and report. Complete runs are not repeated, so a demo that was interrupted
resumes when it is started again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..data.shapes import make_shapes
from ..lock import Lock
from .outcome import Outcome, keep_masks, watched_images
from .plans import PLANS, TEACHER, Plan
from .runs import ENGINES, Engine, Run, load_engine, make_all

__all__ = ["ENGINES", "PLANS", "Engine", "Plan", "demo", "keep_masks"]


def demo(output: Path, *, engine: str = "torchvision", seeds: Sequence[int] = (0,), quick: bool = False) -> None:
    """Make the missing runs, print the table, write ``table.md``, ``picture.jpg`` and ``report.html``.

    Args:
        output: a folder, which gets the data, the teacher, and a folder per seed.
        engine, quick: a key of ``ENGINES``; see ``Plan``.
        seeds: the seeds of the students; data and teacher have seed 0.

    Raises:
        ConfigError: the engine is not installed, or another demo is at work in the folder.
    """
    runner = load_engine(engine)
    with Lock(output):
        started = time.perf_counter()
        data = make_shapes(output / "data")
        outcome = Outcome(output, engine, runner.DESCRIPTION, seeds, data)
        given = {"data": data, "teacher": output / "teacher", "watched": watched_images(data)}
        plans = [(TEACHER, output / "teacher", 0)]
        plans += [(plan, outcome.folders(plan)[i], seed) for i, seed in enumerate(seeds) for plan in PLANS]
        teacher, *students = (
            Run(engine, f"{number} of {len(plans)}", replace(plan, quick=quick), folder, {**given, "seed": seed})
            for number, (plan, folder, seed) in enumerate(plans, 1)
        )
        teacher.make()
        on_gpu = runner.USES_GPU and torch.cuda.is_available()
        make_all(students, 1 if on_gpu else min(runner.AT_ONCE, torch.get_num_threads()))
        table = outcome.write()
        print(f"\n{table}\n\ntook {time.perf_counter() - started:.0f} s; the report: {output / 'report.html'}")
