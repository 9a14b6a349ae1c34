#!/usr/bin/env python
"""The growth of time and memory of ACAM-KD's distiller with a level's positions: 1k to 67k, as P2 of 800x1344 has.

    python -m benchmarks.attention_growth --output output/growth.jsonl --plot output/growth.png --threads 2
    python -m benchmarks.attention_growth --output output/growth.jsonl --plot output/growth.png --plot-only

A point is forward and backward of one level of 256 channels and 6 masks, for one image with random features. Every
point has a process of its own. Points in --output are not measured again, so the same command resumes a run that was
killed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from acam_kd.compare.records import read_records
from acam_kd.core.errors import one_line_errors
from acam_kd.files import to_json, write_atomically
from acam_kd.methods.acam.paths import PATHS
from acam_kd.methods.acam.settings import POOLING
from benchmarks.growth import GRIDS, Point, measured
from benchmarks.growth_plot import plot, table
from benchmarks.memory import in_own_process, naive_gib


def _grid(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) * int(width)):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected height and width as 100x168")
    return int(height), int(width)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON lines, one per point")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG file to draw")
    parser.add_argument("--plot-only", action="store_true", help="draw the points in --output; measure nothing")
    parser.add_argument("--grids", type=_grid, nargs="+", default=list(GRIDS), metavar="HxW", help="sizes of the level")
    chosen = ["auto", "map", "materialized"]
    parser.add_argument("--paths", choices=PATHS, nargs="+", default=chosen, help="paths of the cross-attention")
    parser.add_argument(
        "--max-positions",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="values of max_positions, each with both kinds of pooling",
    )
    parser.add_argument(
        "--naive-limit-gib", type=float, default=8.0, metavar="GIB", help="limit for the path materialized"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float64", "float16", "bfloat16"), default="float32")
    return parser


def points(args: argparse.Namespace) -> list[Point]:
    """List the points asked for, small ones first.

    Points too large for the materialized attention are printed and left out.
    """
    series: list[tuple[str, int, str]] = [(path, 0, "keys") for path in args.paths]
    series += [("auto", limit, pooling) for limit in args.max_positions for pooling in POOLING]
    chosen = []
    for height, width in sorted(args.grids, key=lambda grid: grid[0] * grid[1]):
        for path, limit, pooling in series:
            needed = naive_gib(1, height * width)
            if path == "materialized" and needed > args.naive_limit_gib:
                allowed = f"--naive-limit-gib {args.naive_limit_gib:g}"
                print(f"{path} at {height}x{width} is left out: it needs {needed:.1f} GiB ({allowed})", file=sys.stderr)
                continue
            chosen.append(Point(path, height, width, limit, pooling, args.device, args.dtype, args.threads))
    return chosen


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the records of the file, after measuring those that it lacks."""
    records = read_records(args.output)
    if args.plot_only:
        return records
    for point in points(args):
        if any(asdict(point).items() <= record.items() for record in records):
            continue
        print(f"{point.series} at {point.height}x{point.width}", file=sys.stderr)
        record = in_own_process(measured, point, args.repeats)
        if "failed" in record:
            positions = point.height * point.width
            record = {"series": point.series, **asdict(point), "positions": positions, **record}
        records.append(record)
        write_atomically(args.output, "".join(to_json(record) + "\n" for record in records))
    return records


def main(arguments: list[str] | None = None) -> None:
    """Measure the missing points, print the table and draw the plot."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if min(args.threads, args.repeats) < 1:
        parser.error(f"--threads and --repeats: found {args.threads} and {args.repeats}, expected at least 1")
    with one_line_errors("attention_growth.py"):
        records = measure(args)
    print(table(records), end="")
    if args.plot:
        write_atomically(args.plot, plot(records))


if __name__ == "__main__":
    main()
