"""Stands for ``acam-kd train`` in the tests of the comparison: leaves what it would, without any training."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--output", type=Path)
parser.add_argument("--resume", action="store_true")
parser.add_argument("--seed", type=int)
parser.add_argument("--iterations", type=int, default=100)
parser.add_argument("--ap", type=float, default=10.0)
parser.add_argument("--ratio", type=float)
parser.add_argument("--teacher", type=Path)
parser.add_argument("--val", help="has no effect")
parser.add_argument("--fail-if", type=Path, help="a file")
parser.add_argument("--classes", nargs="+", default=[], help="of a classifier, which takes the first for all")
parser.add_argument("--wait-for", type=Path, help="a file")
args = parser.parse_args()

args.output.mkdir(exist_ok=True)
with open(args.output / "starts", "a") as file:
    file.write(f"{args.resume}\n")
if args.teacher and not (args.teacher / "result.json").is_file():
    sys.exit("stub: the teacher is not there")
if args.fail_if and args.fail_if.exists():
    sys.exit("stub: something went wrong\n")
while args.wait_for and not args.wait_for.exists():
    time.sleep(0.05)
if args.classes:
    (args.output / "confusion.png").touch()
    (args.output / "student.json").write_text(json.dumps({"categories": dict(enumerate(args.classes))}))
    results = [{"label": label, "predicted": 0} for label in range(len(args.classes))]
    (args.output / "predictions.json").write_text(json.dumps(results))
(args.output / "settings.json").write_text(json.dumps({"iterations": args.iterations}))
lines = [{"step": 20, "seconds": 12.0}, {"step": 40, "seconds": 16.0}, {"step": 60, "seconds": 90.0}]
lines += [{"step": 40, "seconds": 90.5}, {"step": 60, "seconds": 94.5}, {"step": 80, "seconds": 98.5}]  # resumed
if args.ratio:
    lines += [{"step": s, "distill/distillation_to_task": args.ratio * f} for s, f in ((20, 0.5), (40, 9), (40, 1.5))]
text = "\n".join(map(json.dumps, lines)) + '\n{"step": 8'
(args.output / "metrics.jsonl").write_text(text)
result = {"metrics": {"AP": args.ap + args.seed, "AP50": 50.0}, "seconds": 120.0, "device": "CPU"}
(args.output / "result.json").write_text(json.dumps(result))
