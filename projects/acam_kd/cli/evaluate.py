"""``acam-kd eval``: the metrics of a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from ..core.errors import ConfigError
from ..export.candidate import Candidate
from ..fields import instance, like, option
from ..tv.run import Settings
from .command import Command, Values
from .data import Validation
from .runs import detectron2, is_detectron2
from .train import print_metrics

__all__ = ["COMMAND"]


@dataclass(frozen=True)
class Model:
    """The model to evaluate."""

    student: str = like(
        Settings, "student", section="the model", metavar="NAME|FOLDER|FILE",
        help="a torchvision model's name, the folder of a finished run, or a file that acam-kd export has written",
    )  # fmt: skip
    student_weights: str = like(Settings, "student_weights")
    size: int | None = like(Settings, "size")
    batch_size: int = like(Settings, "batch_size", default=8, help="images at a time")
    workers: int = like(Settings, "workers", help="processes that read images")
    checkpoint: str = option("last", choices=("last", "best"), help="which weights of a run's folder")
    beside: tuple[str, ...] = option(
        (),
        metavar="FOLDER|FILE",
        help="more runs and exported files, as the teacher and the student in torch: a table with metric, size and "
        "latency of all",
    )
    confusion: str = option(
        "", metavar="FILE.png", help="of a classifier: write a picture of the true and the predicted classes"
    )


def run(values: Values) -> None:
    """Evaluate, and print the metrics.

    Raises:
        ConfigError: an option, the data or the weights cannot be used.
    """
    from ..tv.build import evaluate
    from ..tv.measure import measure, table

    model = asdict(instance(Model, values))
    split = instance(Validation, values).splits("val")["val"]
    beside, name, weights = model.pop("beside"), model.pop("student"), model.pop("student_weights")
    found = is_detectron2(name) or Path(name).is_file() or (model["checkpoint"] != "last" and Path(name).is_dir())
    if found or beside:
        if weights:
            raise ConfigError("student_weights", weights, "none for an exported file, a run's folder or a table")
        if confusion := model.pop("confusion"):
            raise ConfigError("confusion", confusion, "none for an exported file, a run of Detectron2 or a table")
        checkpoint, size = model.pop("checkpoint"), model.pop("size")
        candidates = [_load(each, checkpoint=checkpoint, size=size) for each in (name, *beside)]
        rows = [measure(each, split, **model) for each in candidates]
        print_metrics(rows[0].metrics)
        print(table(rows))
        return
    model.pop("checkpoint")
    print_metrics(evaluate(name, weights, split, **model))


def _load(model: str, *, checkpoint: str, size: int | None) -> Candidate:
    if is_detectron2(model):
        made: Candidate = detectron2("predict").load_candidate(model, checkpoint=checkpoint, size=size)
        return made
    from ..tv.measure import load_candidate

    return load_candidate(model, checkpoint=checkpoint, size=size)


COMMAND = Command(
    "eval", "evaluate a model", run, (Validation, Model), "acam-kd eval --data FOLDER --student output/run"
)
