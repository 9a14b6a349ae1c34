#!/usr/bin/env python
"""The cost of a distillation step: time, its parts, peak memory and FLOPs, against the plain student and mimicking.

    python -m benchmarks.step --config-file configs/acam_retinanet_r50_r101.yaml --size 320 480 MODEL.DEVICE cpu
    python -m benchmarks.step --config-file configs/acam_retinanet_r50_r101.yaml --size 320 480 --size 800 1344 --amp \\
        --json output/benchmark.json
    python -m benchmarks.step --config-file configs/acam_deeplabv3_r18_r101.yaml --size 512 1024 --batch 2 \\
        MODEL.DEVICE cpu
    python -m benchmarks.step --config-file configs/acam_retinanet_r50_r101.yaml --methods all -- MODEL.DEVICE cpu
    python -m benchmarks.step --config-file configs/acam_retinanet_r50_r101.yaml \\
        --also "DISTILL.TEACHER.PRECISION bfloat16" --also "DISTILL.CHANNELS_LAST True" -- MODEL.DEVICE cpu

``--methods`` measures other registered methods too, with their defaults; ``--also`` the config's method with other
options. The variants take turns in one process, so their ratios hold even where the machine's speed drifts; memory is
measured in a process of its own per variant. Weights are random and images are noise, which costs the same. The
optimizer's step is not part of a step.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from acam_kd.core import read_methods
from acam_kd.core.errors import ConfigError, one_line_errors
from acam_kd.d2.names import key
from acam_kd.files import to_json, write_atomically
from benchmarks.memory import in_own_process, naive_gib
from benchmarks.report import machine, markdown
from benchmarks.variants import FLOOR, METHODS, NAIVE, PLAIN, Setting, Variant, examine, times, variants


def _methods(text: str) -> str:
    try:
        return "all" if text == "all" else "+".join(read_methods(text))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _pairs(text: str) -> list[str]:
    found = shlex.split(text)
    if len(found) % 2 or not found:
        raise argparse.ArgumentTypeError(f"must be KEY VALUE pairs in quotes, found {text!r}")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True)
    parser.add_argument(
        "--size", type=int, nargs=2, action="append", metavar=("H", "W"), help="may be repeated; default: 320 480"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7, help="steps of each variant that are timed")
    parser.add_argument("--amp", action="store_true", help="the forward under autocast to float16")
    parser.add_argument(
        "--methods",
        type=_methods,
        nargs="+",
        default=[],
        metavar="METHOD[+METHOD...]",
        help=f"measured beside them: {', '.join(METHODS)}; several at once, as PKD+KD; or all",
    )
    parser.add_argument(
        "--also",
        type=_pairs,
        action="append",
        default=[],
        metavar="'KEY VALUE ...'",
        help="a row more: the config's method with these changes; may be repeated",
    )
    parser.add_argument(
        "--naive-limit-gib",
        type=float,
        default=8.0,
        metavar="GIB",
        help="the naive attention is left out where the matrices of its largest level need more (default: 8)",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="for the tables; else they are printed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="for the raw figures")
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs for the config")
    return parser


def examined(chosen: list[Variant], setting: Setting, size: tuple[int, int], limit: float) -> dict[str, Any]:
    """Examine one size but for times: ``rows`` by variant, and ``left_out``, variant -> why."""
    found: dict[str, Any] = {"size": list(size), "left_out": {}, "rows": []}
    levels: dict[str, list[int]] = {}
    for variant in chosen:
        print(f"{size[0]}x{size[1]}: memory and FLOPs of {variant.name}", file=sys.stderr)
        if variant.name.endswith(NAIVE):
            largest = max((height * width for height, width in levels.values()), default=0)
            needed = naive_gib(setting.batch, largest)
            if needed > limit:
                found["left_out"][variant.name] = f"it needs {needed:.1f} GiB (--naive-limit-gib {limit:g})"
                continue
        try:
            row = in_own_process(examine, variant, setting, size)
        except RuntimeError as error:
            sys.exit(f"benchmarks.step: measuring {variant.name!r} failed: {error}")
        levels = row.get("levels") or levels
        found["rows"].append({"variant": variant.name, **row})
    return found


def measure(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Return the record of all sizes; it is written to --json after each."""
    setting = Setting(args.config_file, tuple(args.opts), args.batch, args.amp)
    chosen = variants(setting, args.methods, args.also)
    limit = args.naive_limit_gib
    sizes = [tuple(size) for size in args.size or [[320, 480]]]
    every = [examined(chosen, setting, size, limit) for size in sizes]  # before anything large is in this process
    device = chosen[0].config(setting).MODEL.DEVICE
    record: dict[str, Any] = {"command": command, **vars(args), **machine(device), "plain": PLAIN, "floor": FLOOR}
    record = {key: str(value) if isinstance(value, Path) else value for key, value in record.items()}
    record["sizes"] = []
    for size, found in zip(sizes, every):
        print(f"{size[0]}x{size[1]}: times", file=sys.stderr)
        fitting = {row["variant"] for row in found["rows"] if not row.get("failed")}
        timed = times([variant for variant in chosen if variant.name in fitting], setting, size, args.repeats)
        for row in found["rows"]:
            row.update(timed.get(row["variant"], {}))
            row["seconds"] = [sum(parts.values()) for parts in row.get("parts", ())]
        record["sizes"].append(found)
        if args.json:
            write_atomically(args.json, to_json(record, indent=1) + "\n")
    return record


def main(arguments: list[str] | None = None) -> None:
    """Measure; print or write the tables, and write the raw figures."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    args = parser.parse_args(given)
    if min(args.batch, args.repeats, *(side for size in args.size or () for side in size)) < 1:
        parser.error("--size, --batch and --repeats must be at least 1")
    with one_line_errors("benchmarks.step", key):
        tables = markdown(measure(args, f"python -m benchmarks.step {shlex.join(given)}"))
    if args.markdown:
        write_atomically(args.markdown, tables)
    else:
        print(tables, end="")


if __name__ == "__main__":
    main()
