"""The losses in what a model returns in training."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["losses_of", "non_finite", "with_losses", "with_unused"]


def losses_of(output: Any) -> dict[str, Tensor]:
    """Return the named 0-d losses in what a model returned in training; empty if it returned something else."""
    if isinstance(output, Tensor):
        return {"loss": output} if output.dim() == 0 and output.is_floating_point() else {}
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, Mapping) or not all(isinstance(x, Tensor) and x.dim() == 0 for x in first.values()):
        return {}
    return dict(first)


def with_losses(output: Any, losses: Mapping[str, Tensor]) -> Any:
    """Return the output with other losses: of the same type as one for which ``losses_of`` is not empty."""
    if isinstance(output, Tensor):
        return torch.stack([x.to(output.dtype) for x in losses.values()]).sum()
    first = output[0] if isinstance(output, tuple) else output
    merged = dict(losses)
    if type(first) is not dict:
        merged = copy.copy(first)
        merged.update(losses)
    if not isinstance(output, tuple):
        return merged
    fields = (merged, *output[1:])
    return type(output)(*fields) if hasattr(output, "_fields") else fields


def with_unused(losses: Mapping[str, Tensor], unused: nn.Module) -> dict[str, Tensor]:
    """Return the same losses, the first of which gives zero gradients to a module that did not run.

    DistributedDataParallel stops at a parameter without a gradient.

    Args:
        losses: at least one, 0-d.
        unused: the module whose parameters get the zero gradients.
    """
    nothing = [0 * p.sum() for p in unused.parameters() if p.requires_grad]  # the gradient takes a parameter's strides
    first, *_ = losses
    zero = torch.stack(nothing).sum() if nothing else losses[first].new_zeros(())
    return {**losses, first: losses[first] + zero.to(losses[first].dtype)}


def non_finite(losses: Mapping[str, Tensor]) -> list[str]:
    """Return ``name = value`` for every loss that is not finite, after one transfer from the device."""
    if not losses:
        return []
    values = torch.stack([loss.detach().float().reshape(()) for loss in losses.values()]).tolist()
    return [f"{name} = {value}" for name, value in zip(losses, values) if not math.isfinite(value)]
