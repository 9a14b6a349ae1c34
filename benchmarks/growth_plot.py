"""The growth of a cost: time and memory over positions, on logarithmic axes, and the exponent."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from acam_kd.report.curves import PALETTE, STYLE

__all__ = ["FIT_FROM", "exponent", "plot", "series_of", "table"]

Record = Mapping[str, Any]
FIT_FROM = 4000
"""The positions from which points count for the exponent. Below them, constant costs matter too."""


def series_of(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Map series to their records with times, by positions; device and dtype are named where they differ."""
    where = {(record["device"], record["dtype"], record["threads"]) for record in records}
    series: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: record["positions"]):
        threads = f", threads: {record['threads']}" if record["device"] == "cpu" else ""
        name = f"{record['series']} ({record['device']}, {record['dtype']}{threads})"
        if record.get("seconds"):
            series.setdefault(name if len(where) > 1 else record["series"], []).append(record)
    return series


def exponent(positions: Sequence[float], costs: Sequence[float]) -> float | None:
    """Fit the b of costs = a * positions^b, by least squares on the logarithms, from ``FIT_FROM`` positions on.

    It is None for fewer than two such points.
    """
    points = [(math.log(n), math.log(cost)) for n, cost in zip(positions, costs) if n >= FIT_FROM and cost > 0]
    if len({x for x, _ in points}) < 2:
        return None
    x, y = np.array(points).T
    return float(np.polyfit(x, y, 1)[0])


def table(records: Sequence[Record]) -> str:
    """Write a Markdown table with a row per point, and the exponents below it."""
    lines = ["| attention | positions | ms, median (range) | extra memory, GiB |", "|---|---|---|---|"]
    notes = []
    for name, points in series_of(records).items():
        for point in points:
            ms = [1e3 * value for value in point["seconds"]]
            spread = f"{statistics.median(ms):.1f} ({min(ms):.1f}-{max(ms):.1f})"
            extra = f"{point['extra_memory'] / 2**30:.3f}"
            lines.append(f"| {name} | {point['positions']} ({point['height']}x{point['width']}) | {spread} | {extra} |")
        time, memory = _exponents(points)
        largest = points[-1]["positions"]
        if time is not None:
            also = "" if memory is None else f", of memory {memory:.2f}"
            notes.append(f"{name}: exponent of time {time:.2f}{also}, from {FIT_FROM} to {largest} positions.")
    notes += [f"{r['series']} at {r['positions']} positions: {r['failed']}." for r in records if r.get("failed")]
    return "\n".join([*lines, *(["", "\n\n".join(notes)] if notes else [])]) + "\n"


def plot(records: Sequence[Record]) -> bytes:
    """Draw time and memory over positions; return a PNG file."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        both = figure.subplots(1, 2)
        for place, (name, points) in enumerate(series_of(records).items()):
            colour = PALETTE[place % len(PALETTE)]
            positions = [point["positions"] for point in points]
            for axes, costs, power in zip(both, _costs(points), _exponents(points)):
                label = name if power is None else f"{name}: positions^{power:.2f}"
                axes.plot(positions, costs, "o-", color=colour, markersize=4, label=label)
        for axes, title in zip(both, ("forward and backward, seconds", "extra memory at the peak, GiB")):
            costs_are_positive = not axes.lines or any((np.asarray(line.get_ydata()) > 0).any() for line in axes.lines)
            axes.set(xscale="log", yscale="log" if costs_are_positive else "linear", xlabel="positions")
            axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
            if axes.lines:
                axes.legend(fontsize=8, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _costs(points: Sequence[Record]) -> tuple[list[float], list[float]]:
    """Return the median seconds and the GiB of each point."""
    return [statistics.median(p["seconds"]) for p in points], [p["extra_memory"] / 2**30 for p in points]


def _exponents(points: Sequence[Record]) -> tuple[float | None, float | None]:
    positions = [point["positions"] for point in points]
    time, memory = (exponent(positions, costs) for costs in _costs(points))
    return time, memory
