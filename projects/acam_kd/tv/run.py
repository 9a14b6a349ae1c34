"""The settings of a run, and the card of its student."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError
from ..data.splits import Split
from .data import Images

__all__ = ["ANYTIME", "Card", "Settings", "read_card"]

ANYTIME = (
    "devices",
    "num_nodes",
    "accelerator",
    "workers",
    "eval_period",
    "checkpoint_period",
    "channels_last",
    "teacher_compile",
    "no_teacher_check",
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
        no_teacher_check: leave out the teacher's evaluation on a few validation images before the first step.
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
        accelerator, devices, num_nodes: the same arguments of Lightning's Fabric. ``devices`` is a number or ``auto``,
            per node.
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
    no_teacher_check: bool = False
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
    devices: int | str = 1
    num_nodes: int = 1
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
