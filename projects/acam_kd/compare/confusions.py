"""The picture of the confusions of a comparison of classifiers: a matrix for each row, added up over its seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..report.confusion import draw_confusions
from .plan import Run

__all__ = ["confusion_picture"]

Counts = np.ndarray[Any, Any]


def confusion_picture(runs: Sequence[Run]) -> bytes | None:
    """Draw the rows of a setting, as a PNG file; None if its runs are of no classifiers, or none is complete.

    Args:
        runs: of the setting, in the order of the rows. Those without files, as those made elsewhere, are left out.
    """
    rows: dict[str, Counts] = {}
    names: tuple[str, ...] = ()
    for run in runs:
        found = _read(run.folder) if run.trained else None
        if found is not None and (not names or names == found[0]):
            names, counts = found
            rows[run.row] = rows.get(run.row, 0) + counts
    return draw_confusions(rows, names) if rows else None


def _read(folder: Path) -> tuple[tuple[str, ...], Counts] | None:
    """Return the names of the classes and the counts (K, K) of a classifier's last evaluation, None if there are none.

    Of the engines' runs a classifier's alone has a picture of its own confusions.
    """
    if not (folder / "confusion.png").is_file():
        return None
    try:
        names: Mapping[str, str] = json.loads((folder / "student.json").read_text())["categories"]
        counts = np.zeros((len(names), len(names)), int)
        for result in json.loads((folder / "predictions.json").read_text()):
            counts[result["label"], result["predicted"]] += 1
    except (OSError, ValueError, KeyError, TypeError, IndexError):  # damaged: the table does not depend on it
        return None
    return tuple(names.values()), counts
