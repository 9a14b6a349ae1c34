"""All that a GPU is wanted for, in one process and a few minutes: exactness, costs, kernels, methods, engines.

    python -m benchmarks.gpu --output output/gpu
    python -m benchmarks.gpu --output output/gpu --skip kernels engines
    python -m benchmarks.gpu --output output/gpu --only 'ACAM-KD$'        # rows by the end of their names, and so on
    python -m benchmarks.gpu --output output/gpu --small            # on a CPU, in seconds: tries the script itself

The sections are

* ``paths``: every path and precision of the cross-attention against float64, values and all gradients, at three widths;
* ``kernels``: torch's attention kernels alone, at the positions of P3 and P2 of an 800x1344 image;
* ``steps``: time, parts and peak memory of a step: plain, floor, ACAM-KD and each of its paths and options;
* ``methods``: two steps of every method, with finite gradients and none missing;
* ``engines``: the time of a step in either engine over that of a bare loop, of the same model and batch.

A failure costs its own row alone: the traceback is in ``gpu.json`` and the rest is measured. A section that is out of
time leaves the rest of its rows out, and the file names them. Weights are random and images noise; no network is
needed, and of Detectron2 the Python files alone.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from acam_kd.files import to_json, write_atomically
from benchmarks import gpu_paths, gpu_steps
from benchmarks.gpu_case import Case, Scale
from benchmarks.gpu_report import tables
from benchmarks.report import machine

__all__ = ["SECTIONS", "main", "measured"]

SECTIONS = {
    "paths": (gpu_paths.exactness, 35),
    "kernels": (gpu_paths.kernels, 30),
    "steps": (gpu_steps.steps, 130),
    "methods": (gpu_steps.methods, 60),
    "engines": (gpu_steps.engines, 45),
}
"""Name -> the function that lists its cases, and the seconds that they may take together."""


def measured(name: str, scale: Scale, seconds: float, only: str = "") -> dict[str, Any]:
    """Run the cases of a section and return its record.

    Args:
        name: one of ``SECTIONS``.
        scale: how large everything is.
        seconds: the time after which no further case begins.
        only: a regular expression; cases in whose name it is not found are no part of the section.

    Returns:
        ``rows``: case -> what it measured, or ``error``, its traceback; ``left_out``: cases; ``seconds``.
    """
    start = time.perf_counter()
    record: dict[str, Any] = {"rows": {}, "left_out": [], "seconds": 0.0}
    try:
        for case in SECTIONS[name][0](scale):
            if not re.search(only, case.name):
                continue
            if time.perf_counter() - start > seconds:
                record["left_out"].append(case.name)
                continue
            record["rows"][case.name] = {**case.about, **_row(case, scale)}
    except Exception:  # of the list itself
        record["error"] = traceback.format_exc()
    record["seconds"] = time.perf_counter() - start
    return record


def _row(case: Case, scale: Scale) -> dict[str, Any]:
    """Run a case with a memory that is free and a peak that is its own."""
    _free(scale)
    print(f"  {case.name}", file=sys.stderr, flush=True)
    try:
        return case.run()
    except Exception:
        return {"error": traceback.format_exc()}
    finally:
        _free(scale)


def _free(scale: Scale) -> None:
    gc.collect()
    if scale.on_gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="gets gpu.json and gpu.md")
    parser.add_argument("--small", action="store_true", help="tiny sizes on the CPU: to try the script")
    parser.add_argument("--skip", nargs="+", choices=list(SECTIONS), default=[], help="sections to leave out")
    parser.add_argument("--only", default="", metavar="REGEX", help="rows in whose name it is found; all if left out")
    parser.add_argument("--budget", type=float, default=1.0, metavar="FACTOR", help="of every section's seconds")
    return parser


def _sections(args: argparse.Namespace, scale: Scale) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, (_, seconds) in SECTIONS.items():
        if name not in args.skip:
            print(name, file=sys.stderr, flush=True)
            yield name, measured(name, scale, seconds * args.budget, args.only)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the record after every section, and print the tables."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if not args.small and not torch.cuda.is_available():
        parser.error("no GPU was found; --small tries the script on a CPU")
    scale = Scale(small=args.small)
    args.output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    gc.collect()
    gc.freeze()  # what the imports made is not looked at again between the cases
    record: dict[str, Any] = {"small": args.small, **machine(scale.device), "sections": {}}
    for name, section in _sections(args, scale):
        record["sections"][name] = section
        record["seconds"] = time.perf_counter() - start
        write_atomically(args.output / "gpu.json", to_json(record, indent=1) + "\n")
    text = tables(record)
    write_atomically(args.output / "gpu.md", text)
    print(text, end="")


if __name__ == "__main__":
    main()
