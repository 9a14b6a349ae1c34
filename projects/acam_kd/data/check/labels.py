"""The check of images and label PNGs: every file, and the classes that have pixels."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...core.errors import ConfigError
from ..images import AUTO
from ..labels import IGNORED, check_values, open_label
from .findings import Findings, Say
from .look import check_depth, check_header, headers_of, look_at

__all__ = ["check_labels"]

logger = logging.getLogger("acam_kd")
Array = np.ndarray[Any, Any]
GOOD_PART = 0.01
"""A part of the pixels that is no accident."""


def check_labels(
    pairs: Sequence[tuple[str, str]],
    classes: Sequence[str],
    *,
    ignored: int = IGNORED,
    name: str,
    image_range: str = AUTO,
    reader: str = "",
    say: Say = logger.info,
) -> list[int]:
    """Check every image and label before a run starts.

    Labels without a pixel that counts, and classes without a pixel, are warnings.

    Args:
        pairs: (image, label) each.
        classes: the names of class 0, 1, ...
        ignored: the one other value that a label may have.
        name: the dataset's name in messages.
        image_range, reader, say: see ``check_coco``.

    Returns:
        The number of pixels of each class.

    Raises:
        ConfigError: a file cannot be read, or image and label differ in size. Or a label has several channels or
            wrong values, or fewer than two classes have pixels.
    """
    findings = Findings(name)
    images, labels = [image for image, _ in pairs], [label for _, label in pairs]
    root = os.path.commonpath([os.path.abspath(os.path.dirname(path)) for path in images])
    headers = [header for _, header in headers_of(images, root, f"{name}: images")]
    root = os.path.commonpath([os.path.abspath(os.path.dirname(path)) for path in labels])
    looked = look_at(labels, _facts_of, kind="labels", root=root, words=f"{name}: labels")
    histograms = np.zeros((len(pairs), 256), dtype=np.int64)
    for index, (header, (_, facts)) in enumerate(zip(headers, looked)):
        image, label = map(os.path.abspath, pairs[index])
        if header is None:
            findings.refuse("image file", f"image {image},", "which does not exist any more")
        elif check_header(header, f"image {image}", findings, image_range=image_range, reader=reader):
            histograms[index] = _check_label(
                facts, label, (header.width, header.height), len(classes), ignored, findings
            )
    known = [header for header in headers if header is not None]
    check_depth(known, findings, image_range=image_range, reader=reader)
    findings.raise_if_any(say)
    findings.tell(say)
    return _check_classes(histograms, pairs, classes, ignored, name)


def _facts_of(path: str) -> list[Any]:
    """Return width, height, the values with their numbers of pixels, and the problem of a label: see ``look_at``."""
    try:
        with open_label(path) as label:
            counted = [[value, count] for value, count in enumerate(label.histogram()) if count]
            return [label.width, label.height, counted, []]
    except ConfigError as error:
        return [0, 0, [], [str(error.value), error.allowed, error.hint]]


def _check_label(
    facts: Any, label: str, size: tuple[int, int], num_classes: int, ignored: int, findings: Findings
) -> Array:
    """Check one label against the size of its image; return the number of pixels of each value, (256,)."""
    histogram = np.zeros(256, dtype=np.int64)
    if facts is None:
        findings.refuse("label file", f"label {label},", "which does not exist any more")
        return histogram
    width, height, counted, problem = facts
    if problem:
        findings.refuse("label file", "label", *problem)
        return histogram
    for value, count in counted:
        histogram[value] = count
    if (width, height) != size:
        found, allowed = f"with {width} x {height} pixels", f"{size[0]} x {size[1]}, as its image"
        findings.refuse("size of label", f"label {label}", found, allowed)
    try:
        check_values(histogram, label, num_classes, ignored)
    except ConfigError as error:
        findings.refuse("values of label", "label", str(error.value), error.allowed, error.hint)
    return histogram


def _check_classes(
    histograms: Array, pairs: Sequence[tuple[str, str]], classes: Sequence[str], ignored: int, name: str
) -> list[int]:
    """Refuse labels that nothing can be learnt from; warn of those that teach nothing."""
    values = histograms.sum(0)
    counts: list[int] = values[: len(classes)].tolist()
    if not any(counts):
        found = f"{name}: {len(pairs)} labels whose pixels are all {ignored}, which is ignored"
        raise ConfigError("dataset", found, allowed="pixels of a class")
    present = [f"{each} ({number})" for number, each in enumerate(classes) if counts[number]]
    if len(present) < 2:
        _refuse_one_class(present[0], float(values[ignored] / values.sum()), len(pairs), ignored, name)
    empty = np.flatnonzero(histograms[:, : len(classes)].sum(1) == 0)
    if len(empty):
        first = pairs[empty[0]][1]
        logger.warning(f"{name}: {len(empty)} of {len(pairs)} labels are ignored as a whole, the first is {first}")
    absent = [f"{each} ({number})" for number, each in enumerate(classes) if not counts[number]]
    if absent:
        logger.warning(f"{name}: no pixel of {', '.join(absent)} in {len(pairs)} labels")
    return counts


def _refuse_one_class(present: str, part: float, labels: int, ignored: int, name: str) -> None:
    """Refuse labels of one class only: every model would be right everywhere."""
    if part >= GOOD_PART:
        found = f"pixels of {present} only, and {100 * part:.0f} % of {ignored}, which is ignored"
        hint = f"if {ignored} is the foreground: write 1 instead, and name two classes in {{classes}}"
    else:
        found = f"pixels of {present} only"
        hint = "the background is a class too: it has a number of its own, and a name in {classes}"
    raise ConfigError("dataset", f"{name}: {labels} labels with {found}", "pixels of two classes at least", hint)
