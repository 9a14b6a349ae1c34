"""Records of measurements and of the machine, and the Markdown of such a record."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from acam_kd.compare.records import about

from .timing import PARTS

__all__ = ["described", "machine", "markdown", "table"]

Record = Mapping[str, Any]
CPUINFO = Path("/proc/cpuinfo")


def machine(device: str) -> dict[str, Any]:
    """Describe the machine, the versions and the date of a measurement.

    Args:
        device: torch's name of the device.
    """
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.processor() or platform.machine()
    on_gpu = device.startswith("cuda") and torch.cuda.is_available()
    record = {**about(torch.get_num_threads()), "cpu": cpu, "device": torch.cuda.get_device_name() if on_gpu else "CPU"}
    record["versions"]["cuda"] = torch.version.cuda
    return record


def described(record: Record) -> str:
    """Describe the machine and the versions of a record in one line; the record has the entries of ``machine``."""
    where = f"{record['cpu']}, {record['threads']} thread{'s' * (record['threads'] != 1)}"
    where = where if record["device"] == "CPU" else record["device"]
    names = [f"{name} {version}" for name, version in record["versions"].items() if version]
    return f"{where}; {', '.join(names)}; {record['date'][:10]}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(record: Record) -> str:
    """Write the tables of a benchmark: times and memory, parts, and FLOPs, per size.

    Args:
        record: a record of ``python -m benchmarks.step``.
    """
    plain, floor = record["plain"], record["floor"]
    head = [
        f"`{record['command']}`",
        f"Batch {record['batch']}, {'autocast to float16' if record['amp'] else 'float32'}; {described(record)}.",
        f"A step is forward and backward, without the optimizer's; {record['repeats']} of each were timed, in turns. "
        "Ratios are medians of those within a turn. Weights are random, images noise.",
    ]
    sections = []
    for at in record["sizes"]:
        found = {row["variant"]: row for row in at["rows"]}
        sections += [f"### {at['size'][0]}x{at['size'][1]}", _costs(found, plain, floor, record["device"])]
        sections += [_parts(found), _flops(found), *_uncounted(found)]
        sections += [f"{name} is left out: {why}." for name, why in at["left_out"].items()]
    return "\n\n".join([*head, *sections]) + "\n"


def _costs(found: Mapping[str, Record], plain: str, floor: str, device: str) -> str:
    of = "peak memory of the process" if device == "CPU" else "peak of what torch allocated on the GPU"
    heads = ["step", "ms, median (range)", "/ plain", "/ floor", f"{of}, GiB", "above plain", "/ floor"]
    seconds = {name: row.get("seconds", []) for name, row in found.items()}
    memory = {name: row.get("peak_memory") for name, row in found.items()}
    rows = []
    for name, row in found.items():
        time, peak = seconds[name], memory[name]
        failed = row.get("failed", "")
        spread = f"{_ms(statistics.median(time))} ({_ms(min(time))}-{_ms(max(time))})" if time else failed
        ratios = [_ratio(time, seconds.get(other, [])) for other in (plain, floor)]
        sizes = ["", ""]
        if peak:
            above = f"{(peak - memory[plain]) / 2**30:.2f}" if memory.get(plain) else ""
            sizes = [above, _ratio([peak], [memory.get(floor)])]
        rows.append([name, spread, *ratios, f"{peak / 2**30:.2f}" if peak else failed, *sizes])
    return table(heads, rows)


def _parts(found: Mapping[str, Record]) -> str:
    rows = [
        [name, *(_ms(statistics.median(step[part] for step in row["parts"])) for part in PARTS)]
        for name, row in found.items()
        if row.get("parts")
    ]
    return table(["step, medians in ms", *PARTS], rows)


def _flops(found: Mapping[str, Record]) -> str:
    heads = ["step", "GFLOP of the step", "of the distiller's forward", "backward", "GMAC of its forward by fvcore"]
    rows = []
    for name, row in found.items():
        flops = row.get("flops") or {}
        distiller = flops.get("distiller") or {}
        blind = any(operator.startswith("prim::PythonOp") for operator in distiller.get("fvcore_uncounted", {}))
        traced = "not seen: a custom function" if blind else _giga(distiller.get("fvcore_forward"))
        both = [_giga(distiller.get(way)) for way in ("forward", "backward")]
        rows.append([name, _giga(flops.get("step")), *both, traced])
    return table(heads, rows)


def _uncounted(found: Mapping[str, Record]) -> list[str]:
    """List the operators that fvcore's counter met and did not count."""
    names: dict[str, None] = {}
    for row in found.values():
        distiller = (row.get("flops") or {}).get("distiller") or {}
        names |= dict.fromkeys(distiller.get("fvcore_uncounted", {}))
    listed = ", ".join(f"`{name}`" for name in sorted(names))
    note = "GFLOP: torch's counter, a multiply-add is two; GMAC: fvcore's, it is one, and there is no backward."
    return [f"{note} fvcore did not count: {listed}." if names else note]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


def _ratio(values: Sequence[float], others: Sequence[float | None]) -> str:
    """Write the median of the ratios within a turn."""
    found = [value / other for value, other in zip(values, others) if other]
    return f"{statistics.median(found):.2f}" if found else ""


def _giga(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.2f}"
