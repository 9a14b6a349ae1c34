"""The growth of the cost of ACAM-KD's distiller with the positions of a level, measured point by point."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from acam_kd.core import FeatureSpec
from acam_kd.methods.acam.method import ACAMKD

from .memory import peak_memory, start_peak_memory
from .report import machine
from .timing import Clock

__all__ = ["GRIDS", "Point", "measured"]

GRIDS = ((24, 42), (34, 58), (48, 84), (68, 118), (100, 168), (142, 236), (200, 336))
"""Height and width of levels. P3 and P2 of an image of 800x1344 pixels are 100x168 and 200x336."""


@dataclass(frozen=True)
class Point:
    """One measurement: forward and backward of one level, with one image.

    Args:
        path: the path of the cross-attention.
        height, width: the size of the level.
        max_positions, pooling: the method's arguments; 0 for no pooling.
        device, dtype: torch's names. All dtypes but float32 and float64 run under autocast.
        threads: the number of a CPU's threads.
        channels: C.
        masks: M.
    """

    path: str
    height: int
    width: int
    max_positions: int = 0
    pooling: str = "keys"
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    channels: int = 256
    masks: int = 6

    @property
    def series(self) -> str:
        """The line of the plot that the point lies on."""
        if not self.max_positions:
            return self.path
        return f"{self.pooling} pooled to {self.max_positions}"


def measured(point: Point, repeats: int) -> dict[str, Any]:
    """Measure a point and return its record; meant for a process of its own.

    Returns:
        The point's fields, ``positions``, and the machine as ``on``. ``seconds`` has the time of each repeat, after one
        that warms up. ``extra_memory`` is the number of bytes by which the peak rose above features and weights.
    """
    torch.set_num_threads(point.threads)
    on_gpu = point.device.startswith("cuda")
    step = _step(point)
    clock = Clock(on_gpu)
    before = start_peak_memory(on_gpu)
    seconds = []
    for repeat in range(repeats + 1):
        start = clock.now()
        step()
        end = clock.now()
        clock.wait()
        if repeat:
            seconds.append(clock.seconds(start, end))
    extra = peak_memory(on_gpu) - before
    costs = {"positions": point.height * point.width, "seconds": seconds, "extra_memory": extra}
    return {"series": point.series, **asdict(point), **costs, "on": machine(point.device)}


def _step(point: Point) -> Any:
    """Build the step to measure: forward and backward on random features."""
    torch.manual_seed(0)
    level = {"p": FeatureSpec(channels=point.channels, stride=8)}
    exact = point.dtype in ("float32", "float64")
    dtype = getattr(torch, point.dtype)
    options: dict[str, Any] = {"max_positions": point.max_positions, "pooling": point.pooling}
    distiller = ACAMKD(level, level, num_masks=point.masks, **options).to(point.device, dtype if exact else None)
    distiller.fusion["p"].path = point.path  # type: ignore[assignment]
    shape = (1, point.channels, point.height, point.width)
    student, teacher = (torch.randn(shape, device=point.device, dtype=dtype) for _ in range(2))
    student.requires_grad_()

    def step() -> None:
        with torch.autocast(torch.device(point.device).type, None if exact else dtype, enabled=not exact):
            loss = sum(distiller({"p": student}, {"p": teacher}).values())
        distiller.zero_grad()
        student.grad = None
        loss.backward()  # type: ignore[union-attr]

    return step
