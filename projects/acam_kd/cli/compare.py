"""``acam-kd compare``: the runs of a comparison, several seeds of each row, with records, tables and a plot.

A plan has settings (engine, pair, data), each with its rows: a name, and arguments that are added to the setting's.
Every run is a process of its own and has a folder. The output gets results.jsonl with a line per run, and table.md and
plot.png, which are written again after each run. Finished runs are not repeated, and interrupted ones are resumed. So
the same command resumes a comparison that was killed. A run that fails does not stop the others.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..compare import Comparison, read_plan
from ..fields import instance, natural, option, positive
from ..lock import Lock
from .command import Command, Values

__all__ = ["COMMAND"]

OPTIONS = {"plan": "--plan", "output": "--output", "config": "--config"}
"""The name of an argument in messages -> the option; other arguments are keys of the plan, or of the records."""


@dataclass(frozen=True)
class Comparing:
    """The options of a comparison."""

    plan: Path = option(type=Path, metavar="FILE", help="YAML with settings and rows; see docs/comparison.md")
    output: Path = option(type=Path, metavar="FOLDER", help="folder of all runs; a comparison found there is resumed")
    seeds: tuple[int, ...] = option(
        (), type=natural, metavar="N", help="of the students; if left out, the plan's, else 0 1 2"
    )
    jobs: int = option(1, type=positive, metavar="N", help="number of runs at once")


def run(values: Values) -> None:
    """Make the missing runs, then print the tables.

    Raises:
        ConfigError: the plan cannot be used, or another comparison is at work in the folder.
        SystemExit: a run failed, or the comparison was interrupted.
    """
    asked = instance(Comparing, values)

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with Lock(asked.output):
            status = Comparison(read_plan(asked.plan, asked.seeds), asked.output, asked.jobs).run()
    except KeyboardInterrupt:
        sys.exit("acam-kd: interrupted; the same command resumes it")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status:
        sys.exit(status)


COMMAND = Command(
    "compare",
    "make the runs of a plan, several seeds of each row, and their tables",
    run,
    (Comparing,),
    "acam-kd compare --plan PLAN.yaml --seeds 0 1 2 --output output/compare",
    names=lambda name: OPTIONS.get(name, name),
)
