"""``acam-kd predict``: a student's predictions for pictures and videos."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..fields import instance, option, positive
from ..lock import Lock
from ..report.media import media_files, predict_files
from ..report.predictions import Predictor
from ..tv.names import option as option_of
from .command import Command, Values
from .runs import detectron2, is_detectron2

__all__ = ["COMMAND"]


@dataclass(frozen=True)
class Predict:
    """The options of a prediction."""

    run: str = option(flag="RUN", metavar="RUN", help="a run's folder, of either engine; or an exported file")
    images: tuple[str, ...] = option(
        flag="IMAGES", nargs="+", metavar="IMAGES", help="image files, videos, or folders of them"
    )
    output: Path = option(type=Path, metavar="FOLDER", help="gets the drawn pictures and predictions.json")
    checkpoint: str = option("last", choices=("last", "best"), help="which weights of the run")
    size: int | None = option(None, type=positive, metavar="PIXELS", help="shorter side; else the run's")
    score: float = option(0.3, type=float, metavar="S", help="detections below this are not drawn")


def run(values: Values) -> None:
    """Predict, and print what was written.

    Raises:
        ConfigError: the run or a picture cannot be used.
        RunError: a file cannot be written.
    """
    asked = instance(Predict, values)
    files = media_files(asked.images)
    predictor = _predictor(asked)
    with Lock(asked.output):
        results = predict_files(predictor, files, asked.output, score=asked.score)
    if results.maps:
        print(f"{len(results.images)} images, label maps in {asked.output / 'labels'}")
        return
    if results.named:
        print(f"{len(results.images)} images, the most probable classes of each: {asked.output}")
        return
    drawn = sum(result["score"] >= asked.score for result in results.results)
    found = f"{len(results.results)} detections, {drawn} of them from a score of {asked.score:g} on, which are drawn"
    print(f"{len(results.images)} images, {found}: {asked.output}")


def _predictor(asked: Predict) -> Predictor:
    if is_detectron2(asked.run):
        made: Predictor = detectron2("predict").load_predictor(asked.run, checkpoint=asked.checkpoint, size=asked.size)
        return made
    from ..tv.predict import load_predictor

    return load_predictor(asked.run, checkpoint=asked.checkpoint, size=asked.size)


COMMAND = Command(
    "predict",
    "draw a student's predictions on pictures and videos",
    run,
    (Predict,),
    "acam-kd predict output/run photos --output predictions",
    names=lambda name: "IMAGES" if name == "images" else option_of(name),
)
