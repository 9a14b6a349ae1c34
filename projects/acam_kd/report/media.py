"""The pictures of a prediction: image files, folders of them, videos; and the files that are written for them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as rle

from ..core.errors import ConfigError, RunError
from ..data.images import read_rgb
from ..files import to_json, write_atomically
from .panels import Array
from .predictions import Prediction, Predictor, draw_prediction

__all__ = ["IMAGES", "VIDEOS", "Results", "media_files", "predict_files", "read_image"]

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
BEST = 5
"""The number of a classifier's classes that are written for an image."""
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")


def media_files(paths: Sequence[str], *, suffixes: Sequence[str] = (*IMAGES, *VIDEOS)) -> list[Path]:
    """List the files among the paths, and those with the suffixes in the folders among them, sorted.

    Raises:
        ConfigError: a path does not exist, a folder has no such file, or two files have names that would collide.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes)
            if not inside:
                raise ConfigError("images", f"none in {path.absolute()}", f"files that end in {', '.join(suffixes)}")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise ConfigError("images", f"no file {path.absolute()}", "image files, videos, or folders of them")
    by_stem: dict[str, Path] = {}
    for file in files:
        other = by_stem.setdefault(file.stem, file)
        if other is not file:
            raise ConfigError("images", f"{other} and {file}", "names that differ before the suffix")
    return files


class Results:
    """The results of a prediction, in COCO's format, as they grow; a classifier's have no box.

    Args:
        categories: class number -> name.
    """

    def __init__(self, categories: dict[int, str]) -> None:
        self.categories = categories
        self.images: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []
        self.maps = self.named = 0

    def add(self, name: str, image: Array, found: Prediction) -> None:
        """Take the prediction of one image."""
        number = len(self.images) + 1
        height, width = image.shape[:2]
        self.maps += found.semantic is not None
        self.named += found.probabilities is not None
        self.images.append({"id": number, "file_name": name, "width": width, "height": height})
        for label, score in found.best(BEST):
            self.results.append({"image_id": number, "category_id": label, "score": score})
        for k, (box, label, score) in enumerate(zip(found.boxes, found.labels.tolist(), found.scores.tolist())):
            x0, y0, x1, y1 = (float(value) for value in box)
            result = {"image_id": number, "category_id": label, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
            if found.masks is not None:
                result["segmentation"] = _encode(found.masks[k])
            if found.keypoints is not None:
                result["keypoints"] = found.keypoints[k].astype(float).flatten().tolist()
            self.results.append(result)

    def files(self, *, semantic: bool) -> dict[str, str]:
        """Return the name of each file -> its text."""
        named = [{"id": number, "name": name} for number, name in self.categories.items()]
        files = {"images.json": to_json({"images": self.images, "annotations": [], "categories": named})}
        return files if semantic else {**files, "predictions.json": to_json(self.results)}


def _encode(mask: Array) -> dict[str, Any]:
    encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def predict_files(predictor: Predictor, files: Sequence[Path], output: Path, *, score: float) -> Results:
    """Predict images and videos, and write drawn pictures and results into a folder.

    Written are ``<name>.jpg`` or ``<name>.mp4``, ``labels/<name>.png`` of a segmentation model, ``predictions.json`` in
    COCO's results format, and ``images.json`` with the ids of images and categories. The json files come last.

    Args:
        predictor: the model.
        files: from ``media_files``; all images are read once before the first is predicted.
        output: the folder, which exists.
        score: detections below it are not drawn; ``predictions.json`` has them.

    Raises:
        ConfigError: a file cannot be read.
        RunError: a file cannot be written.
    """
    results, semantic = Results(dict(predictor.categories)), False
    for file in files:
        if file.suffix.lower() not in VIDEOS:
            read_image(file)  # before anything is written
    for file in files:
        if file.suffix.lower() in VIDEOS:
            semantic = _predict_video(predictor, file, output, results, score)
            continue
        image = read_image(file)
        found = predictor(image)
        semantic = found.semantic is not None
        results.add(file.name, image, found)
        drawn = draw_prediction(image, found, predictor.categories, score=score)
        _write(output / f"{file.stem}.jpg", _encoded(".jpg", drawn[:, :, ::-1]))
        if found.semantic is not None:
            _write(output / "labels" / f"{file.stem}.png", _encoded(".png", found.semantic.astype(np.uint8)))
    for name, text in results.files(semantic=semantic).items():
        _write(output / name, text.encode())
    return results


def read_image(file: Path) -> Array:
    """Read an image file as uint8 RGB (H, W, 3).

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return read_rgb(str(file))
    except ConfigError as error:
        raise ConfigError("images", error.value, error.allowed, error.hint) from error


def _encoded(suffix: str, picture: Array) -> bytes:
    _, encoded = cv2.imencode(suffix, np.ascontiguousarray(picture))
    return encoded.tobytes()


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"it cannot be written ({reason})", str(path), "choose another {output}") from error


def _predict_video(predictor: Predictor, file: Path, output: Path, results: Results, score: float) -> bool:
    """Predict a video frame by frame; return True for label maps."""
    semantic = False
    part = output / f".{file.stem}.part.mp4"
    with _opened_video(file) as (capture, rate):
        writer: cv2.VideoWriter | None = None
        try:
            for number, image in enumerate(_frames(capture)):
                found = predictor(image)
                semantic = found.semantic is not None
                results.add(f"{file.name}#{number}", image, found)
                drawn = draw_prediction(image, found, predictor.categories, score=score)
                if found.semantic is not None:
                    path = output / "labels" / f"{file.stem}_{number:06}.png"
                    _write(path, _encoded(".png", found.semantic.astype(np.uint8)))
                if writer is None:
                    code = cv2.VideoWriter.fourcc(*"mp4v")
                    writer = cv2.VideoWriter(str(part), code, rate, (image.shape[1], image.shape[0]))
                writer.write(np.ascontiguousarray(drawn[:, :, ::-1]))
            if writer is None:
                raise ConfigError("images", f"{file.absolute()} without a frame", "a video that OpenCV reads")
            writer.release()
            os.replace(part, output / f"{file.stem}.mp4")
        finally:
            if writer is not None:
                writer.release()
            part.unlink(missing_ok=True)
    return semantic


@contextmanager
def _opened_video(file: Path) -> Iterator[tuple[cv2.VideoCapture, float]]:
    capture = cv2.VideoCapture(str(file))
    try:
        if not capture.isOpened():
            found = f"{file.absolute()}, which cannot be read"
            raise ConfigError("images", found, "a video that OpenCV reads")
        yield capture, capture.get(cv2.CAP_PROP_FPS) or 25.0
    finally:
        capture.release()


def _frames(capture: cv2.VideoCapture) -> Iterator[Array]:
    while True:
        read, frame = capture.read()
        if not read:
            return
        yield np.ascontiguousarray(frame[:, :, ::-1])
