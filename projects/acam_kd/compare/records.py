"""Records of finished runs, in either engine; each is a line of ``results.jsonl``."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from ..core.errors import ConfigError, RunError
from ..files import numbers
from ..json_file import read_json
from .plan import ROOT, Run

__all__ = ["about", "best", "key_of", "read_records", "read_run", "threads_of"]

RATIO = "distill/distillation_to_task"
NO_METRICS = ("step", "iteration", "seconds", "eta_seconds")


def about(threads: int) -> dict[str, Any]:
    """Describe the conditions of a run that starts now: date, versions, and threads as given."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "detectron2"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*", "--abbrev=12"]
    try:
        described = subprocess.run(git, capture_output=True, text=True)
        versions["commit"] = described.stdout.strip() or None
    except OSError:  # git is not installed
        versions["commit"] = None
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"date": date, "versions": versions, "threads": threads}


def key_of(record: Mapping[str, Any]) -> tuple[str, str, int, int | None]:
    """Return the key of the run that a record is of; see ``Run.key``."""
    return record["setting"], record["row"], record["seed"], record.get("tuning", {}).get("candidate")


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the records of a comparison, without a last line that a killed process left incomplete.

    Raises:
        RunError: another line is no record.
    """
    records = []
    lines = path.read_text().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            metrics = {"metrics": numbers(record["metrics"])} if "metrics" in record else {}
            records.append({**record, **metrics})
        except json.JSONDecodeError:
            if number < len(lines):
                raise RunError(
                    "this line is no record",
                    where=f"{path}, line {number}",
                    remedy="remove the line; the record is made again",
                ) from None
    return records


def best(records: Sequence[Mapping[str, Any]], metric: str) -> int:
    """Return the number of the candidate with the highest metric; of equal ones the first.

    A value that is not finite ranks below every other.

    Args:
        records: those of all candidates of one row, in any order.
        metric: the name of the metric.
    """

    def rank(record: Mapping[str, Any]) -> tuple[float, int]:
        value = float(record["metrics"].get(metric, math.nan))
        return (value if math.isfinite(value) else -math.inf), -record["tuning"]["candidate"]

    number: int = max(records, key=rank)["tuning"]["candidate"]
    return number


def read_run(run: Run, known: Mapping[str, Any]) -> dict[str, Any]:
    """Make the record of a complete run from its folder.

    Args:
        run: the run.
        known: the answer of ``about`` when the run started, and ``peak_rss_gib``, which is None if it was not measured.

    Raises:
        ConfigError: the run lacks a metric of the plan.
        RunError: the run is not complete.
    """
    read: Callable[[Path], dict[str, Any]] = READERS[run.setting.engine]
    record = read(run.folder)
    history = record.pop("history")
    record["metrics"] = {name: value for name, value in record["metrics"].items() if name not in NO_METRICS}
    ratios = {line["step"]: line[RATIO] for line in history if RATIO in line}  # the last line of a repeated step
    missing = [name for name in run.setting.metrics if name not in record["metrics"]]
    if missing:
        names = [name for name in record["metrics"] if not name.startswith(("distill/", "loss"))]
        raise ConfigError("metrics", missing[0], allowed=f"metrics of the run: {', '.join(names)}")
    return {
        "setting": run.setting.name,
        "engine": run.setting.engine,
        "row": run.row,
        "seed": run.seed,
        "arguments": run.arguments,
        **({"tuning": {"candidate": run.candidate, "arguments": list(run.tried)}} if run.tuning else {}),
        **record,
        "distillation_to_task": statistics.mean(ratios.values()) if ratios else None,
        **{key: known.get(key) for key in ("peak_rss_gib", "date", "versions", "threads")},
    }


def _read_torchvision(folder: Path) -> dict[str, Any]:
    result = read_json(folder / "result.json")
    iterations = read_json(folder / "settings.json", ("iterations",))["iterations"]
    history = _lines(folder / "metrics.jsonl")
    times = [(line["step"], line["seconds"]) for line in history if "seconds" in line]
    steps = [(t - s) / (j - i) for (i, s), (j, t) in zip(times, times[1:]) if j > i]
    return {
        "iterations": iterations,
        "metrics": {name: value for line in (*history, numbers(result["metrics"])) for name, value in line.items()},
        "seconds_per_step": statistics.median(steps) if steps else result["seconds"] / iterations,
        "seconds_per_step_is": "median" if steps else "total",
        "device": result["device"],
        "peak_gpu_gib": result.get("peak_gpu_gib"),
        "history": history,
    }


def _read_detectron2(folder: Path) -> dict[str, Any]:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    history = [{"step": line["iteration"], **line} for line in _lines(folder / "metrics.json") if "iteration" in line]
    if not history or history[-1]["iteration"] + 1 < config["SOLVER"]["MAX_ITER"]:
        raise RunError(
            f"the metrics end before iteration {config['SOLVER']['MAX_ITER']}", where=str(folder / "metrics.json")
        )
    steps = [line["time"] for line in history if "time" in line]
    memory = [int(number) for number in re.findall(r"max_mem: (\d+)M", _text(folder / "log.txt"))]
    gpu = re.search(r"^GPU [\d,]+ +(.+?)(?: \(arch=.*)?$", _text(folder / "log.txt"), re.MULTILINE)
    device = "CPU" if config["MODEL"]["DEVICE"] == "cpu" else gpu[1] if gpu else config["MODEL"]["DEVICE"]
    return {
        "iterations": config["SOLVER"]["MAX_ITER"],
        "metrics": {name: value for line in history for name, value in line.items()},
        "seconds_per_step": statistics.median(steps) if steps else None,
        "seconds_per_step_is": "median",
        "device": device,
        "peak_gpu_gib": max(memory) / 2**10 if memory else None,
        "history": history,
    }


READERS = {"torchvision": _read_torchvision, "detectron2": _read_detectron2}


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def _lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's log, without incomplete ones.

    A killed run may leave half a line, and a resumed one has it in the middle.
    """
    lines = []
    for line in _text(path).splitlines():
        try:
            lines.append(numbers(json.loads(line)))
        except json.JSONDecodeError:
            continue
    return lines


def threads_of(environment: Mapping[str, str]) -> int:
    """Return the number of threads that torch takes in a process with this environment."""
    return int(environment.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
