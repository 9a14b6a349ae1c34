#!/usr/bin/env python
"""Run the rows of a comparison for several seeds; write its records, its tables and a plot.

    python tools/compare.py --plan configs/compare/shapes_detection.yaml --seeds 0 1 2 --output output/compare

A plan has settings (engine, pair, data), each with its rows: a name and the arguments that make it out of the
setting's. Every run is a process of its own and has a folder. In --output: results.jsonl, a line a run; table.md and
plot.png, written anew after each. What is there is not run again, and a run that was interrupted is resumed, so a
comparison that was killed goes on when the same command is given again. A run that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import fcntl
import signal
import sys
from pathlib import Path
from typing import Any

from acam_kd.compare import Comparison, read_plan
from acam_kd.core.errors import one_line_errors


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, required=True, help="YAML; see configs/compare")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"argument --jobs: at least 1 is needed, found {args.jobs}")

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    args.output.mkdir(parents=True, exist_ok=True)
    with open(args.output / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"compare.py: another compare.py works in {args.output}")
        try:
            with one_line_errors("compare.py"):
                status = Comparison(read_plan(args.plan), args.output, sorted(set(args.seeds)), args.jobs).run()
        except KeyboardInterrupt:
            sys.exit("compare.py: interrupted; the same command goes on")
    sys.exit(status)


if __name__ == "__main__":
    main()
