"""A COCO-format dataset for detection and segmentation, drawn on demand: textured shapes on noise, small to large.

There are six classes: disc, square and triangle, each plain or with a bar across it. A model needs the outline and
an inner part to tell them apart. Seed and index of an image determine all of it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..files import to_json

__all__ = ["CLASSES", "SPLITS", "make_shapes"]

OUTLINES = ("disc", "square", "triangle")
CLASSES = tuple(f"{mark} {outline}" for outline in OUTLINES for mark in ("plain", "barred"))
SPLITS = {"train": 600, "val": 200}
"""Split -> the number of its images."""

Array = np.ndarray[Any, Any]


def make_shapes(root: str | Path, *, size: int = 160, seed: int = 0) -> Path:
    """Write the dataset below ``root``, unless it is there already.

    Half a dataset is never found under the final name, even if several processes write it at once.

    Args:
        root: gets a folder ``shapes_<size>_<seed>`` with ``train.json``, ``val.json`` and their image folders
            ``train``, ``val``. Folders ``train_labels``, ``val_labels`` have label images: 0 is the background, 1 to
            6 are the classes.
        size: height and width of the images, in pixels.
        seed: the same seed gives the same files.

    Returns:
        The folder of the dataset.
    """
    folder = Path(root) / f"shapes_{size}_{seed}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        for number, (split, count) in enumerate(SPLITS.items()):
            _write_split(building, split, count, size, (seed, number))
        building.chmod(0o755)
        os.rename(building, folder)
    except BaseException as error:
        shutil.rmtree(building)
        if not (isinstance(error, OSError) and folder.is_dir()):  # otherwise another process was faster
            raise
    return folder


def _write_split(folder: Path, split: str, count: int, size: int, seed: tuple[int, int]) -> None:
    (folder / split).mkdir()
    (folder / f"{split}_labels").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        pixels, shapes = draw(np.random.default_rng((*seed, index)), size)
        name = f"{index:05d}.png"
        cv2.imwrite(str(folder / split / name), pixels)
        labels = np.zeros((size, size), np.uint8)
        for category, polygon in shapes:
            cv2.fillPoly(labels, [polygon], category + 1)
        cv2.imwrite(str(folder / f"{split}_labels" / name), labels)
        images.append({"id": index + 1, "file_name": name, "height": size, "width": size})
        for category, polygon in shapes:
            annotations.append(_annotation(len(annotations) + 1, index + 1, category, polygon))
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (folder / f"{split}.json").write_text(to_json(content))


def _annotation(number: int, image: int, category: int, polygon: Array) -> dict[str, Any]:
    (x0, y0), (x1, y1) = polygon.min(0).tolist(), polygon.max(0).tolist()
    return {
        "id": number,
        "image_id": image,
        "category_id": category + 1,
        "bbox": [x0, y0, x1 - x0 + 1, y1 - y0 + 1],
        "area": float(cv2.contourArea(polygon)),
        "segmentation": [polygon.reshape(-1).tolist()],
        "iscrowd": 0,
    }


def draw(rng: np.random.Generator, size: int) -> tuple[Array, list[tuple[int, Array]]]:
    """Draw one image.

    Returns:
        The pixels, BGR (size, size, 3), and (class index, outline (K, 2) as x, y) of every shape, from back to front.
    """
    canvas = _texture(rng, size)
    shapes: list[tuple[int, Array]] = []
    placed: list[tuple[float, float, float]] = []
    for category, radius in _sizes(rng, size):
        x, y = rng.uniform(0.6 * radius, size - 0.6 * radius, 2)  # the border cuts some
        if any(np.hypot(x - u, y - v) < 0.8 * max(radius, r) for u, v, r in placed):
            continue  # shapes may overlap, but none hides another
        placed.append((x, y, radius))
        shapes.append((category, _draw_shape(canvas, rng, category, x, y, radius)))
    noisy = canvas + rng.normal(0, 10, canvas.shape)
    return noisy.clip(0, 255).astype(np.uint8), shapes


def _sizes(rng: np.random.Generator, size: int) -> list[tuple[int, float]]:
    """Draw category and radius of 2 to 7 shapes, the largest area first, so that small ones lie over large ones."""
    area = {"disc": np.pi, "square": 2.0, "triangle": 1.3}
    count = int(rng.integers(2, 8))
    radii = np.exp(rng.uniform(np.log(size * 0.055), np.log(size * 0.55), count)).tolist()
    drawn = list(zip(rng.integers(len(CLASSES), size=count).tolist(), radii))
    return sorted(drawn, key=lambda x: -area[OUTLINES[x[0] // 2]] * x[1] ** 2)


def _draw_shape(canvas: Any, rng: np.random.Generator, category: int, x: float, y: float, radius: float) -> Array:
    sides = {"disc": 24, "square": 4, "triangle": 3}[OUTLINES[category // 2]]
    turn = rng.uniform(0, 2 * np.pi)
    angles = turn + 2 * np.pi * np.arange(sides) / sides
    points = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], 1)
    end = canvas.shape[0] - 1
    frame = np.array([[0, 0], [end, 0], [end, end], [0, end]])
    _, cut = cv2.intersectConvexConvex(points.astype(np.float32), frame.astype(np.float32))
    polygon = cut.reshape(-1, 2).round().astype(np.int32)
    mask = np.zeros(canvas.shape[:2], np.uint8)
    cv2.fillPoly(mask, [polygon], 1)
    colour = _colour(rng, category // 2)
    filled = colour + rng.normal(0, 15, (canvas.shape[0], canvas.shape[1], 1))
    canvas[mask > 0] = filled[mask > 0]
    if category % 2:  # the bar
        along = radius * 0.55 * np.array([np.cos(turn), np.sin(turn)])
        ends = [tuple((np.array([x, y]) + sign * along).round().astype(int).tolist()) for sign in (-1, 1)]
        contrast = np.where(colour > 127, colour - 90, colour + 90).tolist()
        cv2.line(canvas, ends[0], ends[1], contrast, max(1, round(radius / 4)))
    return polygon


def _colour(rng: np.random.Generator, outline: int) -> Any:
    """Draw a BGR colour. Each outline has its own tendency of hue, which helps, but does not decide."""
    hue = rng.normal(60 * outline, 20) % 180
    hsv = np.array([[[hue, rng.uniform(70, 220), rng.uniform(70, 230)]]]).astype(np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0].astype(np.float64)


def _texture(rng: np.random.Generator, size: int) -> Any:
    coarse = rng.uniform(90, 165, (5, 5, 3)).astype(np.float32)
    fine = rng.normal(0, 10, (size // 4, size // 4, 3)).astype(np.float32)
    return np.ascontiguousarray(sum(cv2.resize(x, (size, size), interpolation=cv2.INTER_CUBIC) for x in (coarse, fine)))
