"""The results of a comparison, and their description in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .panels import Array

__all__ = ["Detections", "Example", "Row", "Snapshot", "hits", "metric_names", "overlap", "sentences"]

ROLES = ("teacher", "alone", "student")
OVERLAP = 0.5
"""The intersection over union from which a detection counts as an object."""


@dataclass(frozen=True)
class Row:
    """One line of the table: a model that was trained and evaluated.

    Args:
        name: a unique name for the table and the legends.
        note: a description in a few words.
        metrics: name -> value, higher is better, as ``{"AP": 32.4, "AP50": 60.1}``. An undefined metric is NaN. The
            first metric of the first row is the main one.
        seconds: the time of training; NaN if unknown.
        parameters: the number of parameters of the model as it is used; 0 if unknown.
        history: lines of ``{"step": 40, ...}`` with losses (``loss``, ``loss_*``) or metrics, in any order.
        role: ``"teacher"``, ``"alone"`` for the student without distillation, else ``"student"``.

    Raises:
        ValueError: there is no such role.
    """

    name: str
    note: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = math.nan
    parameters: int = 0
    history: Sequence[Mapping[str, float]] = ()
    role: str = "student"

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"the role of row {self.name!r} must be one of {ROLES}, not {self.role!r}")

    def metric(self, name: str) -> float:
        """Return the value of a metric; NaN if there is none."""
        return float(self.metrics.get(name, math.nan))


@dataclass(frozen=True)
class Detections:
    """Boxes (K, 4) as x0, y0, x1, y1 in pixels of the example's image, K labels, scores (K,); None for ground truth."""

    boxes: Array
    labels: Sequence[str]
    scores: Array | None = None


@dataclass(frozen=True)
class Example:
    """One image, uint8 RGB (H, W, 3), its ground truth, and the detections of each row by the row's name."""

    file_name: str
    image: Array
    ground_truth: Detections
    detections: Mapping[str, Detections] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """The masks for one example at one moment of training.

    Args:
        step: the moment.
        image: the index of the example.
        masks: level -> kind -> masks, ``"spatial"`` (M, h, w) and ``"channel"`` (M, C).
        strides: level -> pixels of the example's image per position.
    """

    step: int
    image: int
    masks: Mapping[str, Mapping[str, Array]]
    strides: Mapping[str, float]


def metric_names(rows: Sequence[Row]) -> list[str]:
    """List all metrics that some row has, in the order of their first appearance; the first is the main one."""
    return list(dict.fromkeys(name for row in rows for name in row.metrics))


def sentences(rows: Sequence[Row]) -> list[str]:
    """Compare each distilled student with the students above it in the table, in one sentence or two.

    A row therefore has to come after its controls.
    """
    names = metric_names(rows)
    students = [row for row in rows if row.role != "teacher"]
    if not names:
        return []
    said = []
    for number, row in enumerate(students):
        value = row.metric(names[0])
        if row.role == "alone":
            continue
        if math.isnan(value):
            said.append(f"{row.name} has no {names[0]}.")
            continue
        others = [other for other in students[:number] if not math.isnan(other.metric(names[0]))]
        compared = [f"{_more(value - o.metric(names[0]))} {o.name}" for o in others]
        text = f"{row.name} reaches {value:.2f} {names[0]}"
        text += f": {_listed(compared)}." if compared else "."
        beaten_by = [o.name for o in others if round(value - o.metric(names[0]), 2) <= 0]
        if beaten_by:
            text += f" It does not beat {_listed(beaten_by)}."
        said.append(text + _gap(rows, value, names[0]))
    return said


def _more(difference: float) -> str:
    amount = f"{abs(difference):.2f}"
    if amount == "0.00":
        return "the same as"
    return f"{amount} {'more' if difference > 0 else 'less'} than"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([*([", ".join(parts[:-1])] if len(parts) > 1 else []), parts[-1]])


def _gap(rows: Sequence[Row], value: float, metric: str) -> str:
    """State the part of the gap between student alone and teacher that a value closes; empty if there is no gap."""
    ends = {row.role: row for row in rows if row.role != "student"}
    if len(ends) < 2:
        return ""
    low, high = ends["alone"].metric(metric), ends["teacher"].metric(metric)
    if not high > low or value <= low:
        return ""
    part = (value - low) / (high - low)
    return f" It goes {part:.0%} of the way from {ends['alone'].name} to {ends['teacher'].name}."


def hits(found: Detections, truth: Detections) -> list[bool]:
    """Return for each detection whether it is an object.

    It has to have the label of an object that no other detection has taken, and an overlap of at least ``OVERLAP`` with
    it. The detection with the highest score chooses first.
    """
    order = range(len(found.boxes)) if found.scores is None else np.argsort(-found.scores, kind="stable").tolist()
    free = set(range(len(truth.boxes)))
    result = [False] * len(found.boxes)
    for k in order:
        same = [i for i in free if truth.labels[i] == found.labels[k]]
        overlaps = {i: overlap(found.boxes[k], truth.boxes[i]) for i in same}
        best = max(overlaps, key=lambda i: overlaps[i], default=None)
        if best is not None and overlaps[best] >= OVERLAP:
            free.remove(best)
            result[k] = True
    return result


def overlap(a: Array, b: Array) -> float:
    """Compute the intersection over union of two boxes, x0, y0, x1, y1; 0 for empty ones."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    common = float(sides.clip(min=0).prod())
    union = float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod()) - common
    return common / union if union > 0 else 0.0
