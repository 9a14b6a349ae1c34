#!/usr/bin/env python
"""Run the rows of a comparison for several seeds, and print their table.

    python tools/compare.py --config-file configs/bccd/acam_retinanet.yaml --rows configs/bccd/rows.yaml \\
        --seeds 1 2 --output output/bccd/compare

A row is a name and the KEY VALUE pairs that make it out of the config. Every run is a process of its own
(``train_net.py``), gets the same iterations and data, and leaves one line in ``results.jsonl``. What is there
is not run again, so a comparison that was killed goes on when it is started again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from acam_kd.d2 import add_dataset_options

TRAIN_NET = Path(__file__).resolve().parent.parent / "train_net.py"


def slug(name: str) -> str:
    """The name of a row as a part of a path."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def run(name: str, seed: int, overrides: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate one row with one seed; returns its results."""
    folder = args.output / f"{slug(name)}_seed{seed}"
    command = [sys.executable, str(TRAIN_NET), "--config-file", str(args.config_file), "--resume"]
    for dataset in args.dataset:
        command += ["--dataset", *dataset]
    for dataset in args.sem_seg_dataset:
        command += ["--sem-seg-dataset", *dataset]
    command += [*args.opts, *map(str, overrides), "SEED", str(seed), "OUTPUT_DIR", str(folder)]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "stdout.txt", "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{name}, seed {seed} failed: see {folder / 'stdout.txt'}")
    metrics: dict[str, Any] = {}
    for line in (folder / "metrics.json").read_text().splitlines():
        metrics.update(json.loads(line))
    return {
        "row": name,
        "seed": seed,
        "overrides": overrides,
        "peak_rss_gib": usage.ru_maxrss / 2**20,
        "metrics": metrics,
    }


def table(results: list[dict[str, Any]], rows: list[str], metrics: list[str]) -> str:
    """A Markdown table: per row every metric's mean (and standard deviation) over seeds, and the first of each seed."""
    lines = [f"| row | {' | '.join(metrics)} | {metrics[0]} per seed |", "|---" * (len(metrics) + 2) + "|"]
    for row in rows:
        own = sorted((r for r in results if r["row"] == row), key=lambda r: r["seed"])
        if own:
            found = [[r["metrics"].get(m, float("nan")) for r in own] for m in metrics]
            cells = [_mean_and_deviation(values) for values in found]
            seeds = ", ".join(f"{r['metrics'][metrics[0]]:.2f}" for r in own)
            lines.append(f"| {row} | {' | '.join(cells)} | {seeds} |")
    return "\n".join(lines)


def _mean_and_deviation(values: list[float]) -> str:
    deviation = f" ({statistics.stdev(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="YAML: name -> [KEY, VALUE, ...]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, required=True)
    add_dataset_options(parser)
    parser.add_argument(
        "--metrics", nargs="+", default=["bbox/AP", "bbox/AP50", "bbox/AP75"], help="the first is printed for each seed"
    )
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs for all rows")
    args = parser.parse_args()
    rows: dict[str, list[str]] = yaml.safe_load(args.rows.read_text())
    if len({slug(name) for name in rows}) < len(rows):
        sys.exit(f"compare.py: two rows of {args.rows} would share a folder: {', '.join(map(slug, rows))}")
    args.output.mkdir(parents=True, exist_ok=True)
    record = args.output / "results.jsonl"
    results = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    for seed in args.seeds:
        for name, overrides in rows.items():
            if not any(r["row"] == name and r["seed"] == seed for r in results):
                results.append(run(name, seed, overrides, args))
                with open(record, "a") as file:
                    file.write(json.dumps(results[-1]) + "\n")
                print(
                    f"{name}, seed {seed}: {args.metrics[0]} {results[-1]['metrics'][args.metrics[0]]:.2f}", flush=True
                )
    print(table(results, list(rows), args.metrics))


if __name__ == "__main__":
    main()
