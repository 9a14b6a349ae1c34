"""A comparison that never took place, with all that a report can hold."""

from __future__ import annotations

import math

import numpy as np
import pytest

from acam_kd.data.shapes import CLASSES, draw
from acam_kd.report.results import Detections, Example, Row, Snapshot

STRIDES = {"p3": 8, "p4": 16, "p5": 32, "p6": 64}


def history(start: float, end: float, best: float, *, distilled: bool, steps: int = 400) -> list[dict[str, float]]:
    draw_noise = np.random.default_rng(int(best * 10))
    lines = []
    for step in range(5, steps + 1, 5):
        task = end + (start - end) * math.exp(-step / 120) + 0.05 * draw_noise.random()
        line = {"step": step, "loss": task, "loss_cls": 0.7 * task, "loss_box_reg": 0.3 * task}
        if distilled:
            line |= {"loss_acam_spatial": 40 * math.exp(-step / 60) + 0.4, "loss_acam_diversity": 0.9 - step / 900}
            line["loss"] += line["loss_acam_spatial"] + line["loss_acam_diversity"]
        lines.append(line)
        if step % 100 == 0:
            part = 1 - math.exp(-step / 150)
            lines.append({"step": step, "AP": best * part, "AP50": 1.6 * best * part, "AP75": 0.9 * best * part})
    return lines


def metrics(ap: float) -> dict[str, float]:
    return {"AP": ap, "AP50": 1.6 * ap, "AP75": 0.9 * ap, "APs": 0.5 * ap, "APm": ap, "APl": math.nan}


def detections(truth: Detections, seed: int, size: int) -> Detections:
    rng = np.random.default_rng(seed)
    moved = truth.boxes + rng.normal(0, 5, truth.boxes.shape)
    wrong = np.sort(rng.uniform(0, size, (3, 2, 2)), axis=1).reshape(3, 4)
    labels = [*truth.labels, *rng.choice(CLASSES, 3).tolist()]
    return Detections(np.concatenate([moved, wrong]), labels, rng.uniform(0.2, 1, len(labels)))


def example(index: int, size: int = 160) -> Example:
    pixels, shapes = draw(np.random.default_rng(index), size)
    boxes = np.array([[*outline.min(0), *outline.max(0)] for _, outline in shapes], dtype=float).reshape(-1, 4)
    truth = Detections(boxes, [CLASSES[c] for c, _ in shapes])
    found = {name: detections(truth, index + i, size) for i, name in enumerate(("teacher", "student alone", "ACAM-KD"))}
    return Example(f"val/{index:05d}.png", pixels[: size - 20, :, ::-1].copy(), truth, found)


def snapshot(step: int, image: int) -> Snapshot:
    masks = {}
    for level, stride in STRIDES.items():
        side = 192 // stride
        y, x = np.mgrid[:side, :side] / side
        waves = np.stack([np.sin(5 * x + m + image) * np.cos(4 * y + m * stride) for m in range(6)])
        channels = np.sin(np.outer(np.arange(1, 7), np.arange(64)))
        masks[level] = {
            "spatial": 1 / (1 + np.exp(-waves * step / 50)),
            "channel": 1 / (1 + np.exp(-channels * step / 100)),
        }
    return Snapshot(step, image, masks, STRIDES)


@pytest.fixture
def rows() -> list[Row]:
    alone = history(2.4, 0.9, 20.5, distilled=False)
    return [
        Row("teacher", "6.9 M parameters, 1000 iterations", metrics(35.8), 4000.0, 6_900_000, role="teacher"),
        Row("student alone", "", metrics(20.52), 1512.3, 930_000, alone, role="alone"),
        Row("plain mimicking", "all masks 1", metrics(31.95), 2100, 930_000, history(2.2, 0.7, 31.95, distilled=True)),
        Row("ACAM-KD", "default", metrics(31.6), 2512.0, 930_000, history(2.2, 0.7, 31.6, distilled=True)),
    ]


@pytest.fixture
def content(rows) -> dict:
    """Return the keyword arguments of ``write_report``."""
    return {
        "title": "ACAM-KD on synthetic shapes",
        "intro": "Four detectors were trained on 600 images of shapes and evaluated on 200 others.",
        "about": {
            "command": "python tools/demo.py --minutes 10 --seed 1 --a-rather-long-option some/rather/long/path.yaml",
            "seed": "1",
            "versions": "torch 2.12.1, torchvision 0.27.1",
            "date": "2026-11-21",
            "machine": "2 CPU cores",
        },
        "rows": rows,
        "caveat": "One seed: differences under about 2 AP are noise.",
        "examples": [example(1), example(2)],
        "snapshots": [snapshot(step, image) for step in (0, 100, 400) for image in (0, 1)],
    }
