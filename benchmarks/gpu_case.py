"""The cases that ``benchmarks.gpu`` runs, and the sizes of everything in them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Case", "Scale"]


@dataclass(frozen=True)
class Case:
    """One row of a section.

    Args:
        name: of the row.
        run: measures it and returns the fields of the row.
        about: further fields.
    """

    name: str
    run: Callable[[], dict[str, Any]]
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scale:
    """The sizes of a run on a GPU, or of one that tries the script on a CPU.

    Args:
        small: tiny, on the CPU.
    """

    small: bool = False

    @property
    def device(self) -> str:
        """Torch's name of the device."""
        return "cpu" if self.small else "cuda"

    @property
    def on_gpu(self) -> bool:
        """The device is a GPU."""
        return not self.small

    def of(self, full: Any, small: Any) -> Any:
        """Return the value for this scale."""
        return small if self.small else full

    def clock(self) -> float:
        """Return seconds; on a CPU those of this process alone, so that other processes do not count."""
        return time.perf_counter() if self.on_gpu else time.process_time()

    def wait(self) -> None:
        """Wait until the GPU has done everything."""
        if self.on_gpu:
            torch.cuda.synchronize()
