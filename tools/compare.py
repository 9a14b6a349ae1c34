#!/usr/bin/env python
"""The runs of a comparison, several seeds of each row, with their records, tables and a plot.

    python tools/compare.py --plan configs/compare/shapes_detection.yaml --seeds 0 1 2 --output output/compare

A plan has settings (engine, pair, data), each with its rows: a name, and arguments that are added to the setting's.
Every run is a process of its own and has a folder. --output gets results.jsonl with a line per run, and table.md and
plot.png, which are written again after each run. Finished runs are not repeated, and interrupted ones are resumed. So
the same command resumes a comparison that was killed. A run that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from acam_kd.compare import Comparison, read_plan
from acam_kd.core.errors import one_line_errors
from acam_kd.lock import Lock

OPTIONS = {"plan": "--plan", "output": "--output"}
"""The name of an argument in messages -> the option; other arguments are keys of the plan, or of the records."""


def main(arguments: list[str] | None = None) -> None:
    """Make the missing runs, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, required=True, help="YAML; see configs/compare")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at once")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"argument --jobs: found {args.jobs}, expected at least 1")

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    try:
        with one_line_errors("compare.py", lambda name: OPTIONS.get(name, name)), Lock(args.output):
            status = Comparison(read_plan(args.plan), args.output, sorted(set(args.seeds)), args.jobs).run()
    except KeyboardInterrupt:
        sys.exit("compare.py: interrupted; the same command resumes it")
    sys.exit(status)


if __name__ == "__main__":
    main()
