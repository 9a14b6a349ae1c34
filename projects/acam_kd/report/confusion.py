"""The pictures of the confusions of one classifier, or of several beside each other."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .curves import STYLE

__all__ = ["draw_confusion", "draw_confusions"]

MOST = 30
"""The largest number of classes whose names and counts are written."""
LONGEST = 20
ACROSS = 3
"""The number of matrices beside each other."""


def draw_confusion(counts: np.ndarray[Any, Any], names: Sequence[str]) -> bytes:
    """Draw a matrix of counts, coloured by the share of each row; return a PNG file.

    Args:
        counts: (K, K), rows are the true classes, columns the predicted ones.
        names: of the K classes.

    Example:
        >>> draw_confusion(np.array([[3, 1], [0, 2]]), ["cat", "dog"])[1:4]
        b'PNG'
    """
    return draw_confusions({"": counts}, names)


def draw_confusions(matrices: Mapping[str, np.ndarray[Any, Any]], names: Sequence[str]) -> bytes:
    """Draw a matrix of counts for each title, as ``draw_confusion`` does; return a PNG file.

    Args:
        matrices: title -> (K, K); one at least.
        names: of the K classes.
    """
    side, across = 2.5 + 0.32 * min(len(names), MOST), min(len(matrices), ACROSS)
    down = -(-len(matrices) // across)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(side * across, side * down), layout="constrained")
        places = figure.subplots(down, across, squeeze=False).flatten().tolist()
        for axes, (title, counts) in zip(places, matrices.items()):
            _matrix(axes, counts, names)
            axes.set_title(title, fontsize=9)
        for axes in places[len(matrices) :]:
            axes.set_axis_off()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _matrix(axes: Axes, counts: np.ndarray[Any, Any], names: Sequence[str]) -> None:
    share, number = counts / np.maximum(counts.sum(1, keepdims=True), 1), len(counts)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.grid(False)
    if number > MOST:
        return
    shown = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in names]
    axes.set_xticks(range(number), shown, rotation=90, fontsize=8)
    axes.set_yticks(range(number), shown, fontsize=8)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = "white" if share[row, column] > 0.6 else "black"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=colour)
