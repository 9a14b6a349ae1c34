"""``acam-kd eval``: the metrics of a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..fields import instance, like
from ..tv.run import Settings
from .command import Command, Values
from .data import Validation
from .train import print_metrics

__all__ = ["COMMAND"]


@dataclass(frozen=True)
class Model:
    """The model to evaluate."""

    student: str = like(Settings, "student", section="the model")
    student_weights: str = like(Settings, "student_weights")
    size: int | None = like(Settings, "size")
    batch_size: int = like(Settings, "batch_size", default=8, help="images at a time")
    workers: int = like(Settings, "workers", help="processes that read images")


def run(values: Values) -> None:
    """Evaluate, and print the metrics.

    Raises:
        ConfigError: an option, the data or the weights cannot be used.
    """
    from ..tv.build import evaluate

    model = asdict(instance(Model, values))
    split = instance(Validation, values).splits("val")["val"]
    print_metrics(evaluate(model.pop("student"), model.pop("student_weights"), split, **model))


COMMAND = Command(
    "eval", "evaluate a model", run, (Validation, Model), "acam-kd eval --data FOLDER --student output/run"
)
