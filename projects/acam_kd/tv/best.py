"""The best student of a run so far, by its main metric."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..files import to_json
from ..json_file import read_json
from .folder import RunFolder

__all__ = ["Best"]


class Best:
    """The weights of the best evaluation, ``best.pth``, and its metric, ``best.json``.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def offer(self, student: nn.Module, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the student if its main metric, the first one, is higher than all before.

        Of two equal ones the earlier is kept. A metric that is not a number counts as 0.

        Raises:
            RunError: a file cannot be written.
        """
        name, value = next(iter(metrics.items()))
        before = self.kept(step)
        if before and not _number(value) > _number(before["value"]):
            return
        buffer = io.BytesIO()
        torch.save({key: tensor.cpu() for key, tensor in student.state_dict().items()}, buffer)
        self.folder.write("best.pth", buffer.getvalue())
        content = {"metric": name, "value": value, "step": step, "metrics": dict(metrics)}
        self.folder.write("best.json", to_json(content, indent=1))

    def kept(self, step: int) -> dict[str, Any]:
        """Return what ``best.json`` says; nothing if it is of this step or a later one, which is done anew."""
        path = self.folder.path / "best.json"
        found: dict[str, Any] = read_json(path, ("value", "step")) if path.is_file() else {}
        return found if found and found["step"] < step else {}


def _number(value: float | None) -> float:
    return 0.0 if value is None or math.isnan(value) else value
