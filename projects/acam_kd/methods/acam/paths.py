"""The table by which the way to compute attention is chosen, and the choice of its precision.

The figures behind the table are those of docs/performance.md. On a GPU, in half precision, torch's fused kernels cost
least at a width of 128 or less: at 67,200 positions cuDNN's kernel takes 12.6 ms forward and backward, and 36.2 ms
where the values are 256 wide. Two kernels of width 128 are cheaper than one of 256. In float32 there are no tensor
cores to use; the blocks of ``summarized_attention`` are the cheapest up to 16,800 positions, and by far the dearest
at 67,200.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import ConfigError

__all__ = ["HALF", "PATHS", "PRECISIONS", "RULES", "Rule", "attention_dtype", "check_precision", "chosen_path"]

PATHS = ("auto", "map", "parts", "summary", "materialized")
"""The ways to compute attention; see ``CrossAttentionFusion.path``."""
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
HALF = (torch.float16, torch.bfloat16)
AMPERE = 8
"""The major compute capability from which CUDA devices compute in bfloat16."""


@dataclass(frozen=True)
class Rule:
    """A row of the table: a path, and the cases that it is for.

    Args:
        path: one of ``PATHS``, or ``"columns"``: the projections alone, by the fused kernels.
        device: torch's type of the device; empty for any.
        precision: ``"half"``, ``"single"`` or ``"double"``; empty for any.
        mean: the mean over positions is wanted beside the projections; None for either case.
        channels: the smallest number of channels C.
        positions: the largest number of positions: the root of the number of pairs of a query and a key.
    """

    path: str
    device: str = ""
    precision: str = ""
    mean: bool | None = None
    channels: int = 0
    positions: float = math.inf


RULES = (
    # torch has no fused kernel for float64 on a GPU.
    Rule("summary", device="cuda", precision="double"),
    # M columns are fewer than C: one kernel of the width of Q and K.
    Rule("columns", mean=False),
    # Two kernels of width C / 2 by count and measurement: 25 ms at 67,200 positions. The projections with the received
    # attention by the kernel's backward have the same count and took 1.2 times as long in the step of a RetinaNet.
    Rule("parts", device="cuda", precision="half"),
    # Measured in float32 on an H200: 13 ms against 20 ms at 16,800 positions, 830 ms against 311 ms at 67,200.
    Rule("summary", device="cuda", channels=64, positions=20_000),
    Rule("map", device="cuda"),
    # Measured on a CPU at 2400 positions: 0.47 of the map's time at 256 channels, 0.9 at 64, 1.5 at 19.
    Rule("summary", channels=64),
    Rule("map"),
)
"""The table. The first row that fits is taken."""


def chosen_path(*, device: str, dtype: torch.dtype, channels: int, pairs: int, mean: bool) -> str:
    """Return the path of the first rule that fits.

    Args:
        device: torch's type of the device.
        dtype: of the attention's inputs.
        channels: C of the fused map.
        pairs: query positions times key positions.
        mean: the mean over positions is wanted.

    Example:
        >>> level = {"channels": 256, "pairs": 67_200**2, "mean": True}
        >>> chosen_path(device="cuda", dtype=torch.bfloat16, **level), chosen_path(
        ...     device="cpu", dtype=torch.float32, **level
        ... )
        ('parts', 'summary')
    """
    precision = "half" if dtype in HALF else "double" if dtype == torch.float64 else "single"
    return next(
        rule.path
        for rule in RULES
        if rule.device in ("", device)
        and rule.precision in ("", precision)
        and rule.mean in (None, mean)
        and channels >= rule.channels
        and pairs <= rule.positions**2
    )


def check_precision(precision: str, argument: str = "precision") -> None:
    """Raise ConfigError for an unknown precision."""
    if precision not in PRECISIONS:
        raise ConfigError(argument, precision, f"one of {', '.join(PRECISIONS)}")


def attention_dtype(precision: str, features: Tensor) -> torch.dtype:
    """Return the type in which attention is computed for features of a type and device.

    ``"auto"`` is autocast's type where that is on. Otherwise it is bfloat16 for float32 features on a CUDA device that
    computes in it, and the features' own type everywhere else.
    """
    device = features.device.type
    own = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype
    if own == torch.float64 or features.dtype == torch.float64:
        return torch.float64
    if precision != "auto":
        return getattr(torch, precision)  # type: ignore[no-any-return]
    if own == torch.float32 and device == "cuda" and torch.cuda.get_device_capability(features.device)[0] >= AMPERE:
        return torch.bfloat16
    return own
