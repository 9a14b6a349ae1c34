"""What a run was asked, and what it leaves in its folder."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning
import torch
import torchvision
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import nn

from ..data.splits import Split
from ..files import write_atomically
from .data import Images

__all__ = ["Card", "RunFolder", "Settings", "read_card"]

ANYTIME = (
    "devices",
    "accelerator",
    "workers",
    "eval_period",
    "checkpoint_period",
    "channels_last",
    "teacher_compile",
)
"""Settings that a resumed run may change."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run.

    Args:
        train_split, val_split: the data.
        student: a model's name, or the folder of a finished run, to start from its student.
        student_weights: a file, or a name of torchvision's weights; empty for a random start.
        student_backbone_weights: a name of torchvision's weights for the backbone, as ``DEFAULT``.
        teacher: as ``student``; empty for none.
        teacher_weights: as ``student_weights``.
        teacher_classes: classes of the teacher's file with the background; 0 for those of the data.
        method: a registered distiller, or empty for none.
        options: ``name=value`` each, the method's hyper-parameters.
        inherit: ``auto``, ``always`` or ``never``.
        levels: the student's levels to distil; empty for all that can be.
        taps: ``backbone``, ``logits`` or both; empty for logits in segmentation, the backbone in detection.
        distill_period: only every so many iterations are distilled.
        teacher_precision: ``float32``, ``float16`` or ``bfloat16``; empty for the student's.
        teacher_compile: its backbone by torch.compile.
        channels_last: the memory format of everything.
        size: the shorter side that images are resized to; None for the model's own.
        crop: height and width of what segmentation models are trained on, cut out at a random scale; None for whole
            images.
        iterations: optimizer steps.
        batch_size: images a step, of all devices together.
        optimizer: ``sgd`` or ``adamw``.
        learning_rate: after the warm-up.
        schedule: how it then falls to zero, ``cosine`` or ``poly``.
        warmup: steps, at most a quarter of the run.
        seed: decides the student's start, the order of images and their augmentation.
        precision: Lightning's, as ``32-true``, ``bf16-mixed``, ``16-mixed``.
        accelerator, devices: Lightning's.
        workers: processes that read images, per device.
        eval_period, checkpoint_period: in iterations.
    """

    train_split: Split
    val_split: Split
    student: str
    student_weights: str = ""
    student_backbone_weights: str = ""
    teacher: str = ""
    teacher_weights: str = ""
    teacher_classes: int = 0
    method: str = ""
    options: tuple[str, ...] = ()
    inherit: str = "auto"
    levels: tuple[str, ...] = ()
    taps: tuple[str, ...] = ()
    distill_period: int = 1
    teacher_precision: str = ""
    teacher_compile: bool = False
    channels_last: bool = False
    size: int | None = None
    crop: tuple[int, int] | None = None
    iterations: int = 90000
    batch_size: int = 16
    optimizer: str = "sgd"
    learning_rate: float = 0.01
    schedule: str = "cosine"
    warmup: int = 1000
    seed: int = 0
    precision: str = "32-true"
    accelerator: str = "auto"
    devices: int = 1
    workers: int = 2
    eval_period: int = 5000
    checkpoint_period: int = 1000

    @property
    def student_name(self) -> str:
        """The name of the student's model, also if ``student`` is a folder."""
        return read_card(self.student)[0].name if Path(self.student).is_dir() else self.student

    def resolved(self) -> Settings:
        """With the size of the folder's student, if ``student`` is a folder and no size was asked for."""
        if self.size is None and Path(self.student).is_dir():
            return dataclasses.replace(self, size=read_card(self.student)[0].size)
        return self

    def asdict(self) -> dict[str, Any]:
        """Json's types only."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Card:
    """What one must know to load a student: beside ``student.pth`` as ``student.json``."""

    name: str
    num_classes: int
    size: int | None
    categories: dict[int, str] = field(default_factory=dict)
    """Label -> name."""

    @classmethod
    def of(cls, settings: Settings, data: Images) -> Card:
        """The card of a run's student."""
        return cls(settings.student_name, data.num_classes, settings.size, data.categories)


def read_card(folder: str | Path) -> tuple[Card, Path]:
    """The card and the weights in the folder of a finished run.

    Raises:
        ValueError: there is no finished run.
    """
    path = Path(folder) / "student.json"
    if not path.is_file() or not path.with_suffix(".pth").is_file():
        raise ValueError(
            f"there is no finished run in {Path(folder).absolute()}: it has no student.json and student.pth"
        )
    content = json.loads(path.read_text())
    content["categories"] = {int(label): name for label, name in content["categories"].items()}
    return Card(**content), path.with_suffix(".pth")


class RunFolder:
    """The folder of one run.

    | file | what |
    |---|---|
    | ``settings.json`` | what was asked; there from the start |
    | ``metrics.jsonl`` | a line for every logged step and every evaluation |
    | ``last.ckpt`` | Lightning's checkpoint, to resume from |
    | ``predictions.json`` | of the last evaluation, in COCO's results format (detection) |
    | ``student.pth`` | the state dict of the plain torchvision model, when the run is complete |
    | ``student.json`` | the model's name, classes, size |
    | ``result.json`` | metrics, time, versions; written last, so a run that has it is complete |

    Only the first process of several writes. A run that is interrupted during an evaluation, before its end, goes on
    after it: that one line is missing in ``metrics.jsonl``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / "last.ckpt"

    def result(self) -> dict[str, Any] | None:
        """The result of a complete run, None if it is not complete."""
        path = self.path / "result.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def _check_settings(self, settings: Settings) -> None:
        path = self.path / "settings.json"
        if not path.is_file():
            return
        before, now = json.loads(path.read_text()), settings.asdict()
        defaults = {option.name: option.default for option in dataclasses.fields(Settings)}
        for name, value in now.items():
            was = before.get(name, defaults[name])  # an option that is newer than the run
            if name not in ANYTIME and was != value:
                raise ValueError(f"{self.path} has a run with {name} {was!r}, not {value!r}; choose another --output")

    @rank_zero_only
    def check(self, settings: Settings, *, resume: bool) -> None:
        """Look whether a run may start here, or go on.

        Raises:
            ValueError: the folder has a run, and it is not to be resumed, or has other settings.
        """
        if not resume and (self.path / "settings.json").is_file():
            raise ValueError(f"{self.path} has a run already: give --resume to go on with it, or another --output")
        self._check_settings(settings)

    @rank_zero_only
    def start(self, settings: Settings) -> None:
        """Make the folder and write the settings."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / "settings.json", json.dumps(settings.asdict(), indent=1))
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written: {error.strerror} (option: --output)") from error

    @rank_zero_only
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line to ``metrics.jsonl``."""
        if values:
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def write_predictions(self, results: list[Any]) -> None:
        """Write ``predictions.json``."""
        write_atomically(self.path / "predictions.json", json.dumps(results))

    def finish(
        self, card: Card, student: nn.Module, settings: Settings, *, metrics: dict[str, float], seconds: float
    ) -> dict[str, Any]:
        """Write the student, its card and, last, the result, which it returns."""
        buffer = io.BytesIO()
        torch.save({name: tensor.cpu() for name, tensor in student.state_dict().items()}, buffer)
        write_atomically(self.path / "student.pth", buffer.getvalue())
        write_atomically(self.path / "student.json", json.dumps(dataclasses.asdict(card), indent=1))
        result = {
            "metrics": metrics,
            "seconds": seconds,
            "parameters": sum(p.numel() for p in student.parameters()),
            "settings": settings.asdict(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": {m.__name__: m.__version__ for m in (torch, torchvision, lightning)},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "peak_gpu_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        }
        write_atomically(self.path / "result.json", json.dumps(result, indent=1))
        return result
