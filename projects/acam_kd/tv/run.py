"""The settings of a run, and the folder that it fills."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning
import torch
import torchvision
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import nn

from ..core.errors import ConfigError, RunError
from ..data.images import AUTO
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
"""The settings that a resumed run may change."""


@dataclass(frozen=True)
class Settings:
    """The settings that decide a run.

    Args:
        train_split, val_split: the files to train on and to evaluate on.
        student: a model's name, or the folder of a finished run to start from its student.
        student_weights: a file, or a name of torchvision's weights; empty for a random start.
        student_backbone_weights: a name of torchvision's weights for the backbone, as ``DEFAULT``.
        teacher: a model's name, or the folder of a finished run; empty for no teacher.
        teacher_weights: as ``student_weights``.
        teacher_classes: the number of classes of the teacher's file, with the background; 0 for those of
            ``teacher_class_names``, else of the data.
        teacher_class_names: the names of these classes, which a finished run and torchvision's weights know; the
            background may be left out.
        class_map: ``student's name=teacher's name`` each, of the classes that the teacher calls otherwise.
        method: a registered distiller; empty for none.
        options: the method's hyper-parameters, ``name=value`` each.
        inherit: ``auto``, ``always`` or ``never``.
        levels: the student's levels to distil; empty for all that can be.
        taps: ``backbone``, ``logits`` or both; empty for logits in segmentation, the backbone in detection.
        distill_period: one of so many iterations is distilled.
        teacher_precision: ``float32``, ``float16`` or ``bfloat16``; empty for the student's.
        teacher_compile: the teacher's backbone is compiled by torch.compile.
        channels_last: the memory format of student, teacher and method.
        size: the shorter side that images are resized to; None for the model's own.
        crop: height and width of the parts that segmentation models are trained on, cut out at a random scale. None
            means whole images.
        iterations: the number of optimizer steps.
        batch_size: images a step, of all devices together.
        optimizer: ``sgd`` or ``adamw``.
        learning_rate: its value after the warm-up.
        schedule: the curve on which it then falls to zero, ``cosine`` or ``poly``.
        warmup: the number of its steps, at most a quarter of the run.
        seed: decides the student's start, the order of images and their augmentation.
        precision: Lightning's name, as ``32-true``, ``bf16-mixed``, ``16-mixed``.
        accelerator, devices: the same arguments of Lightning's Trainer.
        workers: the number of processes that read images, per device.
        eval_period, checkpoint_period: iterations between two evaluations, and between two checkpoints.
    """

    train_split: Split
    val_split: Split
    student: str
    student_weights: str = ""
    student_backbone_weights: str = ""
    teacher: str = ""
    teacher_weights: str = ""
    teacher_classes: int = 0
    teacher_class_names: tuple[str, ...] = ()
    class_map: tuple[str, ...] = ()
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
        if not Path(self.student).is_dir():
            return self.student
        return read_card(self.student, argument="student")[0].name

    def resolved(self) -> Settings:
        """Return the settings with the size of a folder's student, if no other size was asked for."""
        if self.size is None and Path(self.student).is_dir():
            return dataclasses.replace(self, size=read_card(self.student, argument="student")[0].size)
        return self

    def asdict(self) -> dict[str, Any]:
        """Return the settings as a dict of json's types only."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Card:
    """The facts needed to load a student; they lie beside ``student.pth`` as ``student.json``."""

    name: str
    num_classes: int
    size: int | None
    categories: dict[int, str] = field(default_factory=dict)
    """Label -> name."""

    @classmethod
    def of(cls, settings: Settings, data: Images) -> Card:
        """Make the card of a run's student."""
        return cls(settings.student_name, data.num_classes, settings.size, data.categories)


def read_card(folder: str | Path, *, argument: str = "folder") -> tuple[Card, Path]:
    """Find the card and the weights in the folder of a finished run.

    Args:
        folder: the folder of the run.
        argument: the name of the argument that the folder was given as, for messages.

    Raises:
        ConfigError: there is no finished run.
    """
    path = Path(folder) / "student.json"
    if not path.is_file() or not path.with_suffix(".pth").is_file():
        raise ConfigError(
            argument,
            f"no finished run in {Path(folder).absolute()}",
            allowed="a folder with student.json and student.pth",
        )
    content = json.loads(path.read_text())
    content["categories"] = {int(label): name for label, name in content["categories"].items()}
    return Card(**content), path.with_suffix(".pth")


class RunFolder:
    """The folder of one run.

    | file | content |
    |---|---|
    | ``settings.json`` | the settings; there from the start |
    | ``metrics.jsonl`` | a line for every logged step and every evaluation |
    | ``last.ckpt`` | Lightning's checkpoint, to resume from |
    | ``predictions.json`` | the detections of the last evaluation, in COCO's results format |
    | ``student.pth`` | the state dict of the plain torchvision model, when the run is complete |
    | ``student.json`` | the model's name, classes, size |
    | ``result.json`` | metrics, time, versions; written last, so a run that has it is complete |

    Only the first process of several writes. A run that is interrupted during an evaluation resumes after it, so the
    line of that evaluation is missing in ``metrics.jsonl``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / "last.ckpt"

    def result(self) -> dict[str, Any] | None:
        """Read the result of a complete run; None if the run is not complete."""
        path = self.path / "result.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def _check_settings(self, settings: Settings) -> None:
        path = self.path / "settings.json"
        if not path.is_file():
            return
        before, now = json.loads(path.read_text()), settings.asdict()
        defaults = {setting.name: setting.default for setting in dataclasses.fields(Settings)}
        for name, value in now.items():
            was = before.get(name, defaults[name])  # the setting may be newer than the run
            was = list(was) if isinstance(was, tuple) else was
            if isinstance(was, dict):  # of a split's files
                was = {"image_range": AUTO, **was}
            if name not in ANYTIME and was != value:
                raise ConfigError(
                    name,
                    value,
                    allowed=f"{was!r}, as in the run in {self.path}",
                    hint="choose another {output}",
                )

    @rank_zero_only
    def check(self, settings: Settings, *, resume: bool) -> None:
        """Check that a run may start here, or resume.

        Raises:
            ConfigError: the folder has a run that is not to be resumed, or that has other settings.
        """
        if not resume and (self.path / "settings.json").is_file():
            raise ConfigError(
                "output",
                f"{self.path}, which has a run already",
                allowed="a folder without a run",
                hint="give {resume} to resume that run, or choose another {output}",
            )
        self._check_settings(settings)

    @rank_zero_only
    def start(self, settings: Settings) -> None:
        """Make the folder and write the settings.

        Raises:
            ConfigError: the folder cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / "settings.json", json.dumps(settings.asdict(), indent=1))
        except OSError as error:
            raise ConfigError(
                "output", f"{self.path}, which cannot be written ({error.strerror})", allowed="a folder to write into"
            ) from error

    @rank_zero_only
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line to ``metrics.jsonl``.

        Raises:
            RunError: it cannot be written, as when the disk is full.
        """
        if values:
            with self._writing(), open(self.path / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def write_predictions(self, results: list[Any]) -> None:
        """Write ``predictions.json``.

        Raises:
            RunError: it cannot be written, as when the disk is full.
        """
        with self._writing():
            write_atomically(self.path / "predictions.json", json.dumps(results))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"writing failed ({error.strerror or error})",
                where=str(self.path),
                remedy="make room on the disk, and resume the run",
            ) from error

    def finish(
        self, card: Card, student: nn.Module, settings: Settings, *, metrics: dict[str, float], seconds: float
    ) -> dict[str, Any]:
        """Write the student, its card and, last, the result; return the result.

        Raises:
            RunError: they cannot be written, as when the disk is full.
        """
        buffer = io.BytesIO()
        torch.save({name: tensor.cpu() for name, tensor in student.state_dict().items()}, buffer)
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
        with self._writing():
            write_atomically(self.path / "student.pth", buffer.getvalue())
            write_atomically(self.path / "student.json", json.dumps(dataclasses.asdict(card), indent=1))
            write_atomically(self.path / "result.json", json.dumps(result, indent=1))
        return result
