"""The folder that a run fills."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning
import torch
import torchvision
import yaml
from torch import nn

from ..core.errors import ConfigError, RunError
from ..data.fingerprint import Fingerprint
from ..files import numbers, to_json, write_atomically
from ..json_file import read_json
from ..lock import Lock
from .card import Card
from .run import Settings
from .written import as_dict, as_options, check_same, completed

__all__ = ["RunFolder"]

README = """\
This folder is a run of acam-kd: {run}.
The student is student.pth, the state dict of a plain torchvision model; student.json has its name, classes, size, and \
pixel statistics other than torchvision's.
Its results: result.json (there when the run is complete), metrics.jsonl (losses, evaluations), predictions.json, \
pictures/, tensorboard/. The best evaluation's student is best.pth, its metrics best.json.
What was asked for: settings.json; settings.yaml repeats it (train --config). Fingerprints of the data: data.json.
To resume: the same command with --resume, from last.ckpt. While a run is at work here, run.lock names its process.
"""


class RunFolder:
    """The folder of one run.

    | file | content |
    |---|---|
    | ``README.txt`` | what lies here, for people |
    | ``settings.json``, ``data.json`` | the settings, the data's fingerprints; there from the start |
    | ``settings.yaml`` | the settings as options, for ``--config`` |
    | ``metrics.jsonl`` | a line for every logged step and every evaluation |
    | ``last.ckpt`` | the checkpoint to resume from |
    | ``predictions.json`` | the detections of the last evaluation, in COCO's results format, or the predicted classes |
    | ``pictures/step_N.jpg`` | predictions beside the ground truth, at every evaluation |
    | ``pictures/masks_step_N.jpg`` | the spatial masks of a method that has some |
    | ``pictures/augmented_step_N.jpg`` | training images above what an augmentor makes of them, likewise |
    | ``confusion.png`` | the true and the predicted classes of the last evaluation, of a classifier |
    | ``student.pth`` | the state dict of the plain torchvision model, from before the final evaluation |
    | ``student.json`` | the model's name, classes, size |
    | ``best.pth``, ``best.json`` | the state dict of the best evaluation so far, and its metrics |
    | ``result.json`` | metrics, time, versions; written last, so a run that has it is complete |
    | ``run.lock`` | the process that is at work here |

    Args:
        path: the folder.
        first: this is the first of several processes; the others write nothing.
    """

    def __init__(self, path: str | Path, *, first: bool = True) -> None:
        self.path, self.first = Path(path), first
        self.checkpoint = self.path / "last.ckpt"

    def locked(self) -> AbstractContextManager[Any]:
        """Return the lock of the folder, which the first process alone needs."""
        return Lock(self.path) if self.first else contextlib.nullcontext()

    def result(self) -> dict[str, Any] | None:
        """Read the result of a complete run; None if the run is not complete."""
        path = self.path / "result.json"
        return read_json(path, ("metrics",)) if path.is_file() else None

    # Before a run starts.

    def check(self, settings: Settings, *, resume: bool) -> Settings:
        """Check that a run may start here, or resume.

        Returns:
            The settings, where what follows from the data is that of the run to resume, unless it was given.

        Raises:
            ConfigError: the folder has a run that is not to be resumed, or that has other settings.
        """
        path = self.path / "settings.json"
        if not path.is_file() or not (self.first or resume):
            return settings
        if not resume:
            raise ConfigError(
                "output",
                f"{self.path}, which has a run already",
                allowed="a folder without a run",
                hint="give {resume} to resume that run, or choose another {output}",
            )
        before = read_json(path)
        settings = completed(settings, before)
        if self.first:
            check_same(settings, before, self.path)
        return settings

    def start(self, settings: Settings, data: Mapping[str, Fingerprint]) -> None:
        """Write the settings and the data's fingerprints, or compare with those of the run that is resumed.

        Args:
            settings: of the run.
            data: the name of a setting -> the fingerprint of its split.

        Raises:
            ConfigError: the data has changed since.
            RunError: the files cannot be written.
        """
        if not self.first:
            return
        path = self.path / "data.json"
        before = read_json(path) if path.is_file() else {}
        for name, fingerprint in data.items():
            if name in before and (changes := fingerprint.changes(before[name])):
                raise ConfigError(
                    name,
                    " and ".join(changes),
                    allowed=f"the data that the run in {self.path} started with",
                    hint="restore the data, or choose another {output}",
                )
        source = f"from {settings.teacher} " if settings.teacher else ""
        teacher = f", distilled {source}by {settings.method}" if settings.method else ""
        self.write("settings.json", to_json(as_dict(settings), indent=1))
        self.write("settings.yaml", yaml.safe_dump(as_options(settings), sort_keys=False, allow_unicode=True))
        self.write("data.json", to_json({name: found.asdict() for name, found in data.items()}, indent=1))
        self.write("README.txt", README.format(run=f"{settings.student}{teacher}"))

    # While it runs.

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Turn the failures of writing a file into one line.

        Raises:
            RunError: it cannot be written, as when the disk is full.
        """
        try:
            yield
        except OSError as error:
            raise RunError(
                f"writing failed ({error.strerror or error})",
                where=str(self.path / name),
                remedy="make room on the disk, or make the folder writable; then {resume} resumes the run",
            ) from error

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file completely or not at all.

        Raises:
            RunError: it cannot be written, as when the disk is full.
        """
        if self.first:
            with self.writing(name):
                (self.path / name).parent.mkdir(exist_ok=True)
                write_atomically(self.path / name, content)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line to ``metrics.jsonl``.

        Raises:
            RunError: it cannot be written, as when the disk is full.
        """
        if values and self.first:
            with self.writing("metrics.jsonl"), open(self.path / "metrics.jsonl", "a") as file:
                file.write(to_json({"step": step, **values}) + "\n")

    def rewind(self, step: int) -> dict[str, float]:
        """Drop the lines of ``metrics.jsonl`` that come after a step, and half a line at the end.

        Returns:
            The metrics of an evaluation at that step; empty if there was none.
        """
        path, kept, metrics = self.path / "metrics.jsonl", [], dict[str, float]()
        for text in path.read_text(errors="replace").splitlines() if path.is_file() else []:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if not isinstance(line, dict) or line.get("step", step + 1) > step:
                continue
            kept.append(to_json(line) + "\n")
            values = {name: value for name, value in numbers(line).items() if name != "step"}
            if line["step"] == step and not any(name.startswith(("loss", "distill/")) for name in values):
                metrics = values
        if path.is_file():
            self.write("metrics.jsonl", "".join(kept))
        return metrics

    def write_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Write the checkpoint; the one before is whole until this one is.

        Raises:
            RunError: it cannot be written, as when the disk is full.
        """
        if self.first:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            self.write(self.checkpoint.name, buffer.getvalue())

    def write_predictions(self, results: list[Any]) -> None:
        """Write ``predictions.json``.

        Raises:
            RunError: it cannot be written, as when the disk is full.
        """
        self.write("predictions.json", to_json(results))

    # When it is done.

    def write_student(self, card: Card, student: nn.Module) -> None:
        """Write the student and its card.

        Raises:
            RunError: they cannot be written, as when the disk is full.
        """
        if self.first:
            buffer = io.BytesIO()
            torch.save({name: tensor.cpu() for name, tensor in student.state_dict().items()}, buffer)
            self.write("student.pth", buffer.getvalue())
            self.write("student.json", to_json(dataclasses.asdict(card), indent=1))

    def finish(
        self, student: nn.Module, settings: Settings, *, metrics: Mapping[str, float], seconds: float
    ) -> dict[str, Any] | None:
        """Write the result, last of all, and return it as it was written.

        Raises:
            RunError: it cannot be written, as when the disk is full.
        """
        if not self.first:
            return None
        device = next(student.parameters()).device  # a machine with a GPU may have trained on its CPU
        on_gpu = device.type == "cuda"
        result = {
            "metrics": dict(metrics),
            "seconds": seconds,
            "parameters": sum(p.numel() for p in student.parameters()),
            "settings": as_dict(settings),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": {m.__name__: m.__version__ for m in (torch, torchvision, lightning)},
            "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
            "peak_gpu_gib": torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None,
        }
        self.write("result.json", to_json(result, indent=1))
        return self.result()
