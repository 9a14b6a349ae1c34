"""The report: one HTML file that contains everything and needs no network."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..files import write_atomically
from .curves import colours, curve, loss_names, series
from .panels import Array, channel_panel, draw_detections, mask_panel
from .results import Detections, Example, Row, Snapshot, hits, metric_names, sentences

__all__ = ["write_report"]

SHOWN = 360
"""The longest side of an example's picture, in pixels."""
JPEG = [cv2.IMWRITE_JPEG_QUALITY, 92, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
"""The encoding of pictures with a photograph: a third of the size of a PNG, and no smeared colours."""
TRUTH, HIT, WRONG = (0, 158, 115), (0, 114, 178), (213, 94, 0)
UNKNOWN = "-"


@dataclass(frozen=True)
class Picture:
    """An ``<img>``: its data URI, its text for readers who do not see it, and its caption."""

    uri: str
    alt: str
    caption: str
    width: int
    height: int


def write_report(
    path: str | Path,
    *,
    title: str,
    about: Mapping[str, str],
    rows: Sequence[Row],
    intro: str = "",
    caveat: str = "",
    examples: Sequence[Example] = (),
    snapshots: Sequence[Snapshot] = (),
) -> None:
    """Write the report of a comparison. The file appears whole or not at all.

    Args:
        path: the HTML file; its folder is made.
        title: the heading.
        about: facts about the runs for the list below the heading, as command, seed, versions, date, machine.
        rows: the table's lines. A row comes after its controls, because it is compared with the rows above it.
        intro: a plain paragraph under the title.
        caveat: the limits of the differences, as the number of seeds; it stands with the sentences.
        examples: images with detections.
        snapshots: masks of the examples at moments of training.

    Raises:
        ValueError: two rows share a name, or a snapshot is of an image that is not among the examples.
    """
    if len({row.name for row in rows}) < len(rows):
        raise ValueError(f"two rows share a name: {', '.join(row.name for row in rows)}")
    for snapshot in snapshots:
        if not 0 <= snapshot.image < len(examples):
            raise ValueError(f"a snapshot is of image {snapshot.image}, but there are {len(examples)} examples")
    folder = Path(__file__).parent
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined)
    text = environment.get_template("report.html").render(
        title=title,
        intro=intro,
        about=about,
        caveat=caveat,
        sentences=sentences(rows),
        table=_table(rows),
        legend=[(row.name, colours(rows)[row.name]) for row in rows],
        losses=_curves(rows, loss_names(rows)),
        metrics=_curves(rows, metric_names(rows)),
        examples=[(example.file_name, _example(example, rows)) for example in examples],
        masks=[(x.file_name, _masks(x, [s for s in snapshots if s.image == i])) for i, x in enumerate(examples)],
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def _table(rows: Sequence[Row]) -> dict[str, Any]:
    """Make the header and the lines of the table; a cell is (text, bold, small text)."""
    names = metric_names(rows)
    alone = next((row for row in rows if row.role == "alone"), None)
    students = [row for row in rows if row.role != "teacher"]
    best = {name: max((round(x.metric(name), 2) for x in students if _known(x, name)), default=0) for name in names}
    lines = []
    for row in rows:
        cells = []
        for name in names:
            value, student = row.metric(name), row.role != "teacher"
            difference = value - alone.metric(name) if alone and row.role == "student" else math.nan
            small = f"{difference:+.2f}" if math.isfinite(difference) else ""
            bold = student and _known(row, name) and round(value, 2) == best[name]
            cells.append((f"{value:.2f}" if _known(row, name) else UNKNOWN, bold, small))
        parameters = f"{row.parameters / 1e6:.2f} M" if row.parameters else UNKNOWN
        lines.append({"row": row, "cells": cells, "parameters": parameters, "time": _duration(row.seconds)})
    teacher = any(row.role == "teacher" for row in rows)
    return {"names": names, "lines": lines, "alone": alone.name if alone else "", "teacher": teacher}


def _known(row: Row, name: str) -> bool:
    return math.isfinite(row.metric(name))


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _curves(rows: Sequence[Row], names: Sequence[str]) -> list[Picture]:
    pictures = []
    for name in names:
        level = {row.name: row.metric(name) for row in rows if row.role == "teacher" and _known(row, name)}
        svg = curve(rows, name, level)
        if svg is not None:
            last = {row.name: series(row, name)[1][-1:] for row in rows}
            ends = ", ".join(f"{key} {value[0]:.3g}" for key, value in last.items() if len(value))
            uri = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
            pictures.append(Picture(uri, f"{name} over steps; last values: {ends}", "", 400, 270))
    return pictures


def _example(example: Example, rows: Sequence[Row]) -> list[Picture]:
    """Draw the ground truth, and for every row as many of its best detections as there are objects."""
    truth = example.ground_truth
    objects = len(truth.boxes)
    pictures = [
        _drawn(example, truth, [TRUTH] * objects, f"ground truth: {objects} object{'s' if objects != 1 else ''}")
    ]
    for row in rows:
        found = example.detections.get(row.name)
        if found is None:
            continue
        best = _best(found, objects)
        right = hits(best, truth)
        caption = f"{row.name}: {sum(right)} of {objects}" if len(best.boxes) else f"{row.name}: no detections"
        pictures.append(_drawn(example, best, [HIT if hit else WRONG for hit in right], caption))
    return pictures


def _best(found: Detections, count: int) -> Detections:
    order = np.arange(len(found.boxes)) if found.scores is None else np.argsort(-found.scores, kind="stable")
    order = order[:count]
    scores = None if found.scores is None else found.scores[order]
    return Detections(found.boxes[order], [found.labels[i] for i in order], scores)


def _drawn(example: Example, found: Detections, colour: Sequence[tuple[int, int, int]], caption: str) -> Picture:
    factor = SHOWN / max(example.image.shape[:2])
    size = round(example.image.shape[1] * factor), round(example.image.shape[0] * factor)
    image = cv2.resize(example.image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)
    boxes = np.asarray(found.boxes, dtype=float).reshape(-1, 4) * factor
    image = draw_detections(image, boxes, found.labels, found.scores, colour)
    return _picture(image, "jpeg", example.file_name, caption)


def _masks(example: Example, snapshots: Sequence[Snapshot]) -> list[tuple[str, list[Picture]]]:
    """Draw, per level, the spatial masks at all moments in one picture and the channel masks in another."""
    snapshots = sorted(snapshots, key=lambda s: s.step)
    levels = []
    for level in dict.fromkeys(level for s in snapshots for level in s.masks):
        having = [s for s in snapshots if level in s.masks]
        spatial = {f"step {s.step}": s.masks[level]["spatial"] for s in having if "spatial" in s.masks[level]}
        channel = {f"step {s.step}": s.masks[level]["channel"] for s in having if "channel" in s.masks[level]}
        strides = {f"step {s.step}": s.strides[level] for s in having if level in s.strides}
        pictures, subject = [], f"{example.file_name}, level {level}"
        if spatial:
            panel = mask_panel(example.image, spatial, strides)
            pictures.append(_picture(panel, "jpeg", subject, "spatial masks"))
        if channel:
            pictures.append(_picture(channel_panel(channel), "png", subject, "channel masks, one cell per channel"))
        levels.append((level, pictures))
    return levels


def _picture(image: Array, kind: str, subject: str, caption: str) -> Picture:
    _, encoded = cv2.imencode(f".{kind}", image[..., ::-1], JPEG if kind == "jpeg" else [])
    uri = f"data:image/{kind};base64,{base64.b64encode(encoded.tobytes()).decode()}"
    return Picture(uri, f"{subject}: {caption}", caption, image.shape[1], image.shape[0])
