"""The cases of ``benchmarks.gpu`` about the torchvision engine: its loop against a bare one, on the same batch."""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import acam_kd
from acam_kd.core.interrupts import Signals
from acam_kd.data.coco import CocoSplit
from acam_kd.tv.data import Images, Stream
from acam_kd.tv.devices import build_fabric
from acam_kd.tv.folder import RunFolder
from acam_kd.tv.loop import Training
from acam_kd.tv.models import build_model
from acam_kd.tv.reports import Reports
from acam_kd.tv.run import Settings

from .gpu_case import Case, Scale

__all__ = ["loops"]

TURNS = 4
"""The number of times that the two loops take turns; the first one warms up."""
CLASSES = 5


@dataclass(frozen=True)
class _Pair:
    """Student, teacher and batch.

    Args:
        student, teacher: names of models.
        size: height and width of the images.
        batch: images.
        steps: of each loop in a turn.
    """

    student: str
    teacher: str
    size: tuple[int, int]
    batch: int
    steps: int


FULL = _Pair("fcos_resnet50_fpn", "fcos_resnet101_fpn", (800, 1344), 2, 6)
SMALL = _Pair("fcos_mobilenet_v3_small_fpn64", "fcos_mobilenet_v3_small_fpn", (96, 96), 2, 3)


def loops(scale: Scale) -> Iterator[Case]:
    """List the torchvision engine's loop, for the floor and for ACAM-KD."""
    pair = scale.of(FULL, SMALL)
    for method, amp in itertools.product(("Mimic", "ACAMKD"), (True, False)):
        if amp and not scale.on_gpu:
            continue
        precision = "AMP float16" if amp else "float32"
        name = f"torchvision, {method}, {precision}"
        yield Case(name, partial(_overhead, scale, pair, method, amp=amp), {"variant": name, "precision": precision})


class _Memory(Images):
    """One batch of noise in memory, again and again."""

    def __init__(self, pair: _Pair) -> None:
        super().__init__(semantic=False)
        self.ids, self.categories = list(range(pair.batch)), {k: str(k) for k in range(1, CLASSES)}
        self.num_classes = CLASSES
        self.pixels = [torch.rand(3, *pair.size) for _ in self.ids]
        box = torch.tensor([[0.1, 0.1, 0.6, 0.7]]) * torch.tensor([*pair.size[::-1], *pair.size[::-1]])
        self.target = {"boxes": box, "labels": torch.tensor([1])}

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, dict[str, Any]]:
        number = index[0] if isinstance(index, tuple) else index
        return self.pixels[number], {**self.target, "image_id": number}


class _Enough(Exception):
    """The steps that are timed are done."""


class _Timed(Reports):
    """The engine's reports, which end the run after some steps and keep the time of all but the first."""

    def __init__(self, folder: RunFolder, settings: Settings, steps: int, scale: Scale) -> None:
        super().__init__(folder, settings)
        self.steps, self.scale, self.started, self.seconds = steps, scale, 0.0, 0.0

    def step(self, step: int, *args: Any, **kwargs: Any) -> None:
        """Report a step."""
        super().step(step, *args, **kwargs)
        if step == 1:
            self.scale.wait()
            self.started = self.scale.clock()
        if step == self.steps + 1:
            self.scale.wait()
            self.seconds = self.scale.clock() - self.started
            raise _Enough


def _overhead(scale: Scale, pair: _Pair, method: str, *, amp: bool) -> dict[str, Any]:
    """Time the same student and batch in a bare loop and in the engine's, in turns."""
    torch.manual_seed(0)
    build = partial(build_model, num_classes=CLASSES, size=min(pair.size))
    student, teacher = (build(name).to(scale.device) for name in (pair.student, pair.teacher))
    _fit_norms(teacher, torch.rand(pair.batch, 3, *pair.size, device=scale.device))
    acam_kd.distill(student.train(), teacher, method=method)
    data, nowhere = _Memory(pair), CocoSplit("", "")
    settings = Settings(
        nowhere, nowhere, pair.student, method=method, batch_size=pair.batch, iterations=10_000, eval_period=10_000,
        checkpoint_period=10_000, learning_rate=1e-7, workers=0, devices=1, precision="16-mixed" if amp else "32-true",
        accelerator="cuda" if scale.on_gpu else "cpu",
    )  # fmt: skip
    bare, engine = [], []
    for turn in range(TURNS):
        times = _bare(scale, pair, student, data, amp=amp), _engine(scale, pair, student, data, settings)
        if turn:
            bare.append(1e3 * times[0])
            engine.append(1e3 * times[1])
    ratio = statistics.median(e / b for e, b in zip(engine, bare))
    return {"bare": statistics.median(bare), "engine": statistics.median(engine), "ratio": ratio}


def _fit_norms(model: nn.Module, images: Tensor) -> None:
    """Give the batch norms of random weights the statistics of these images: without, maps leave float16."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train().backbone(model.transform(list(images))[0].tensors)  # type: ignore[operator]
    model.eval()


def _engine(scale: Scale, pair: _Pair, student: nn.Module, data: Images, settings: Settings) -> float:
    """Return the seconds of a step of the engine."""
    stream = Stream(len(data), batch_size=pair.batch, batches=settings.iterations, seed=0)
    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(Path(path), first=True)
        reports = _Timed(folder, settings, pair.steps, scale)
        with reports:
            training = Training(
                build_fabric(settings), student, settings, training=data, validation=data, stream=stream, folder=folder,
                signals=Signals(), reports=reports,
            )  # fmt: skip
            try:
                training.run()
            except _Enough:
                return reports.seconds / pair.steps
    raise AssertionError("the run ended before its steps")


def _bare(scale: Scale, pair: _Pair, student: nn.Module, data: Images, *, amp: bool) -> float:
    """Return the seconds of a step of forward, backward and optimizer alone."""
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], 1e-7, momentum=0.9)
    scaler = torch.amp.GradScaler(scale.device, enabled=amp)
    images = [data[k][0].to(scale.device) for k in range(pair.batch)]
    targets = [{k: v.to(scale.device) for k, v in data[n][1].items() if k != "image_id"} for n in range(pair.batch)]
    started = 0.0
    for step in range(pair.steps + 1):
        if step == 1:
            scale.wait()
            started = scale.clock()
        with torch.autocast(scale.device, torch.float16, enabled=amp):
            losses = student(images, targets)
        optimizer.zero_grad()
        scaler.scale(torch.stack([loss.float() for loss in losses.values()]).sum()).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
    scale.wait()
    return (scale.clock() - started) / pair.steps
