"""The picture of a classifier's confusions."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .curves import STYLE

__all__ = ["draw_confusion"]

MOST = 30
"""The largest number of classes whose names and counts are written."""
LONGEST = 20


def draw_confusion(counts: np.ndarray[Any, Any], names: Sequence[str]) -> bytes:
    """Draw a matrix of counts, coloured by the share of each row; return a PNG file.

    Args:
        counts: (K, K), rows are the true classes, columns the predicted ones.
        names: of the K classes.

    Example:
        >>> draw_confusion(np.array([[3, 1], [0, 2]]), ["cat", "dog"])[1:4]
        b'PNG'
    """
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    number, named = len(counts), len(counts) <= MOST
    with matplotlib.rc_context(STYLE):
        side = 2.5 + 0.32 * min(number, MOST)
        figure = Figure(figsize=(side, side), layout="constrained")
        axes = figure.subplots()
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.grid(False)
        if named:
            shown = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in names]
            axes.set_xticks(range(number), shown, rotation=90, fontsize=8)
            axes.set_yticks(range(number), shown, fontsize=8)
            for (row, column), count in np.ndenumerate(counts):
                if count:
                    colour = "white" if share[row, column] > 0.6 else "black"
                    axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=colour)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
