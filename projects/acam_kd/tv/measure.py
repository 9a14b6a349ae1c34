"""The metrics, size and latency of models beside each other: teacher, student and exported student."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..data.splits import Split
from ..export.candidate import Candidate
from ..export.exported import DETECTION, INSTANCES, SEGMENTATION, load_exported
from .card import read_card
from .data import Images
from .deployed import outputs_of
from .evaluation import evaluate_model
from .labels import load_data, load_data_of
from .models import is_classifier
from .predict import load_student

__all__ = ["Measured", "latency", "load_candidate", "machine", "measure", "table"]

WARM, REPEATS = 5, 50
BACKGROUND = "background"


@dataclass(frozen=True)
class Measured:
    """The figures of one model.

    Args:
        name: as it was given.
        metrics: in percent.
        parameters: their number; None for an exported file, which does not say.
        mib: the size of the weights, or of the exported file.
        milliseconds: median time for one image, warm.
        device: what it ran on.
    """

    name: str
    metrics: dict[str, float]
    parameters: int | None
    mib: float
    milliseconds: float
    device: str


def load_candidate(model: str, *, checkpoint: str, size: int | None) -> Candidate:
    """Load the student of a run's folder, or an exported file.

    Args:
        model: folder or file.
        checkpoint: of a folder: one of ``predict.CHECKPOINTS``.
        size: the shorter side of images; None for the run's.

    Raises:
        ConfigError: it is neither, or a file of another size.
    """
    if Path(model).is_file():
        exported = load_exported(model, size=size)
        about = exported.metadata
        device = torch.device("cpu")
        return Candidate(model, exported, about.name, about.outputs, about.categories, Path(model), None, device)
    _, path = read_card(model, argument="student")
    network, card = load_student(model, checkpoint=checkpoint, size=size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parameters = sum(p.numel() for p in network.parameters())
    outputs = outputs_of(network)
    return Candidate(model, network.to(device), card.name, outputs, card.categories, path, parameters, device)


def measure(candidate: Candidate, split: Split, *, batch_size: int, workers: int) -> Measured:
    """Evaluate and time a model.

    Args:
        candidate: the model.
        split: to evaluate on.
        batch_size, workers: as in ``build.evaluate``.

    Raises:
        ConfigError: it knows other classes than the data has.
    """
    if is_classifier(candidate.model):
        data = load_data(split, candidate.model, name="validation data")
    else:
        data = load_data_of(split, candidate.model, candidate.outputs, name="validation data")
    network = _relabelled(candidate, data)
    device = candidate.device
    metrics = evaluate_model(network, data, device, batch_size=batch_size, workers=workers)
    time = latency(network, data[0][0].to(device))
    return Measured(candidate.name, metrics, candidate.parameters, _size(candidate) / 2**20, time, device.type)


def _size(candidate: Candidate) -> int:
    """Return the bytes of an exported file; of a run those of the weights, since its file may hold an optimizer too."""
    if candidate.parameters is None:
        return candidate.file.stat().st_size
    return sum(tensor.nbytes for tensor in candidate.network.state_dict().values())


class _Relabelled(nn.Module):
    """A detector whose labels are turned into the data's."""

    def __init__(self, inner: nn.Module, labels: dict[int, int]) -> None:
        super().__init__()
        self.inner, self.labels = inner, labels

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        outputs = self.inner(images)
        for output in outputs:
            numbers = [self.labels.get(int(label), -1) for label in output["labels"]]
            output["labels"] = torch.tensor(numbers, dtype=torch.int64)
        return outputs  # type: ignore[no-any-return]


def _relabelled(candidate: Candidate, data: Images) -> nn.Module:
    semantic = candidate.outputs == SEGMENTATION
    known = candidate.categories
    first = {0: BACKGROUND} if semantic else {}  # data in COCO's format does not name it
    if {**first, **known} == {**first, **data.categories}:
        return candidate.network
    labels = {name: label for label, name in data.categories.items()}
    if candidate.outputs not in (DETECTION, INSTANCES) or {*known.values()} != {*labels}:
        raise ConfigError("student", f"{candidate.name} with the categories {known}", f"the data's {data.categories}")
    return _Relabelled(candidate.network, {label: labels[name] for label, name in known.items()})


@torch.inference_mode()
def latency(model: nn.Module, image: Tensor, *, repeats: int = REPEATS) -> float:
    """Return the median time for one image in milliseconds, after a few runs to get warm.

    Args:
        model: in evaluation mode.
        image: (3, H, W), on the model's device.
        repeats: number of runs.
    """
    times = []
    for number in range(WARM + repeats):
        start = perf_counter()
        model([image])
        if image.is_cuda:
            torch.cuda.synchronize()
        if number >= WARM:
            times.append(perf_counter() - start)
    return 1000 * statistics.median(times)


def machine() -> str:
    """Return this machine's name and what it computes with."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.node()} ({os.cpu_count()} CPUs, {torch.get_num_threads()} threads{gpu})"


def table(rows: Sequence[Measured]) -> str:
    """Write the figures as a table of text."""
    (metric, *_) = rows[0].metrics
    cells = [("model", metric, "parameters", "MiB", "ms / image", "device")]
    for row in rows:
        parameters = "" if row.parameters is None else f"{row.parameters / 1e6:.2f} M"
        value = next(iter(row.metrics.values()))
        cells.append((row.name, f"{value:.2f}", parameters, f"{row.mib:.1f}", f"{row.milliseconds:.1f}", row.device))
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in cells]
    return "\n".join([*lines, f"median of {REPEATS} single images, warm, on {machine()}"])
