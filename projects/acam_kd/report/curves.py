"""Curves of losses and metrics over training steps, one small SVG per quantity."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .panels import Array
from .results import Row

__all__ = ["colours", "curve", "loss_names", "series"]

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's colours, which the colour-blind can tell apart."""
GREY = "#6b7280"
SMOOTHED_FROM = 60
"""The number of points from which a running mean is drawn over the pale curve."""
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "xtick.color": "#374151",
    "ytick.color": "#374151",
    "svg.hashsalt": "acam-kd",
}


def colours(rows: Sequence[Row]) -> dict[str, str]:
    """Map the names of the rows to colours; teachers are grey."""
    students = [row.name for row in rows if row.role != "teacher"]
    coloured = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(students)}
    return {row.name: coloured.get(row.name, GREY) for row in rows}


def loss_names(rows: Sequence[Row]) -> list[str]:
    """List all losses in any history: the total first, then those that most rows share, which are the task's."""
    counts: dict[str, int] = {}
    for row in rows:
        for name in dict.fromkeys(k for line in row.history for k in line if k == "loss" or k.startswith("loss_")):
            counts[name] = counts.get(name, 0) + 1
    return sorted(counts, key=lambda name: (name != "loss", -counts[name]))


def series(row: Row, name: str) -> tuple[Array, Array]:
    """Return steps and finite values of a quantity, in the order of the steps."""
    points = [(line["step"], line[name]) for line in row.history if math.isfinite(line.get(name, math.nan))]
    values = np.array(sorted(points), dtype=float).reshape(-1, 2)
    return values[:, 0], values[:, 1]


def curve(rows: Sequence[Row], name: str, level: Mapping[str, float]) -> bytes | None:
    """Draw one quantity of all rows.

    Args:
        rows: the rows to draw; rows without this quantity are left out.
        name: a key of the histories.
        level: the name of a row -> a value to draw as a dashed line, for rows without a history.

    Returns:
        An SVG file; None if there is nothing to draw.
    """
    drawn = {row.name: series(row, name) for row in rows}
    drawn = {key: (steps, values) for key, (steps, values) in drawn.items() if len(steps)}
    if not drawn:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.0, 2.7), layout="constrained")
        axes = figure.add_subplot()
        palette = colours(rows)
        for key, (steps, values) in drawn.items():
            _draw(axes, steps, values, palette[key])
        for key, value in level.items():
            axes.axhline(value, color=palette[key], linestyle="--", linewidth=1.2)
        everything = np.concatenate([values for _, values in drawn.values()])
        if everything.min() > 0 and everything.max() > 20 * everything.min() and name.startswith("loss"):
            axes.set_yscale("log")
        axes.set_title(name, loc="left", fontsize=10, fontweight="bold", color="#111827")
        axes.set_xlabel("step")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _draw(axes: matplotlib.axes.Axes, steps: Array, values: Array, colour: str) -> None:
    if len(steps) < SMOOTHED_FROM:
        axes.plot(steps, values, color=colour, linewidth=1.6, marker="o", markersize=3)
        return
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    window = len(steps) // 20
    mean = np.convolve(values, np.ones(window) / window, "valid")
    axes.plot(steps[window // 2 :][: len(mean)], mean, color=colour, linewidth=1.6)
