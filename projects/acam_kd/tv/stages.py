"""The stages of a classifier: its parts by the stride of their maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core import LOGITS, ConfigError, ModuleTap
from ..core.errors import first_line
from ..core.teacher import evaluating

__all__ = ["stages"]


@torch.no_grad()
def stages(model: nn.Module, example: Any = None, *, first: int = 2) -> dict[str, str]:
    """Return ``c2``, ``c3``, ... -> the last part of stride 4, 8, ..., and ``logits`` -> the last layer.

    Parts are its children, or those of ``features`` or of a RegNet's ``trunk_output``.

    Args:
        model: a classifier, called with a batch.
        example: a batch; an empty image of 224 x 224 if left out.
        first: the finest level, 0 for stride 1.

    Raises:
        ConfigError: the model fails on the example.
    """
    parts = dict(model.named_children())
    for holder in ("features", "trunk_output"):
        if isinstance(parts.get(holder), nn.Module):
            parts = {f"{holder}.{name}": part for name, part in parts[holder].named_children()}
    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    taps = {path: ModuleTap(part, path) for path, part in parts.items()}
    like = next(model.parameters())
    if not isinstance(example, Tensor):
        example = torch.zeros(1, 3, 224, 224, device=like.device, dtype=like.dtype)
    levels: dict[str, str] = {}
    try:
        for tap in taps.values():
            tap.arm()
        with evaluating(model):
            model(example)
        for path, tap in taps.items():
            output = tap.read(last=True).output if tap.stays else None
            if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2] > 1:
                levels[f"c{(example.shape[2] // output.shape[2]).bit_length() - 1}"] = path
    except RuntimeError as error:
        reason = first_line(error)
        raise ConfigError(
            "example_inputs", f"{tuple(example.shape)}, on which a {type(model).__name__} fails: {reason[:160]}",
            "a batch that it takes",
        ) from error  # fmt: skip
    finally:
        for tap in taps.values():
            tap.remove()
    found = {level: path for level, path in levels.items() if int(level[1:]) >= first}
    return {**found, LOGITS: linear[-1]} if linear else found
