"""Standardised features, of all levels of a pyramid together: few kernels, where each level alone would take dozens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...core.errors import ConfigError
from .masked import cast, common_type

__all__ = ["check_features", "standardized"]

DEVIATION_EPS = 1e-6
"""Added to every standard deviation, so that a constant channel does not divide by zero."""
FEATURES = ("raw", "standardized")


def check_features(features: str) -> None:
    """Raise ConfigError for a kind of features that is not known."""
    if features not in FEATURES:
        raise ConfigError("features", features, f"one of {', '.join(FEATURES)}")


def standardized(maps: Sequence[Tensor]) -> list[Tensor]:
    """Standardise every channel to mean 0 and deviation 1 over the images and positions of the process's batch.

    The error of two standardised maps does not depend on the scale of either network. A single position becomes 0.

    Args:
        maps: (N, C, H, W) each.

    Returns:
        Maps of the same shapes, in float32 at least, with gradients.

    Example:
        >>> standardized([torch.tensor([[[[1.0, 3.0]]]])])[0].flatten().tolist()
        [-0.7071..., 0.7071...]
    """
    if not all(x.numel() for x in maps):  # nothing has a mean
        return [x if not x.numel() else standardized([x])[0] for x in maps]
    with torch.autocast(maps[0].device.type, enabled=False):
        return list(_Standardized.apply(*maps))  # type: ignore[no-untyped-call]


class _Standardized(torch.autograd.Function):
    """The standardised maps y = (x - mean) / s, with s the deviation d plus a small number.

    With K images and positions, g the gradient at y and averages over them, the gradient at x is
    (g - mean(g)) / s - y sum(g y) / (d (K - 1)).
    """

    @staticmethod
    def forward(ctx: Any, *maps: Tensor) -> tuple[Tensor, ...]:
        found = cast(maps, [common_type(maps)] * len(maps))
        ctx.set_materialize_grads(False)
        counts = [x.numel() // x.shape[1] for x in found]
        moments = [torch.std_mean(x, (0, 2, 3), correction=int(k > 1), keepdim=True) for x, k in zip(found, counts)]
        scales = list(torch._foreach_add([deviation for deviation, _ in moments], DEVIATION_EPS))
        found = [(x - mean).div_(scale) for x, (_, mean), scale in zip(found, moments, scales)]
        ctx.needed = [i for i, x in enumerate(maps) if x.requires_grad]
        ctx.types = [maps[i].dtype for i in ctx.needed]
        ctx.counts = [counts[i] for i in ctx.needed]
        ctx.save_for_backward(*(part for i in ctx.needed for part in (found[i], moments[i][0], scales[i])))
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        returned: list[Tensor | None] = [None] * len(gradients)
        saved = ctx.saved_tensors
        made, deviations, scales = ([*saved[start::3]] for start in range(3))
        given = [gradients[i] for i in ctx.needed]
        incoming = [torch.zeros_like(y) if g is None else g for g, y in zip(given, made)]
        products = torch._foreach_mul(incoming, made)
        sums = [x.sum((0, 2, 3), keepdim=True) for x in products]
        means = [x.mean((0, 2, 3), keepdim=True) for x in incoming]
        # A constant channel has y = 0, whatever divides it.
        divisors = torch._foreach_mul(
            torch._foreach_clamp_min(deviations, torch.finfo(made[0].dtype).tiny), [-max(k - 1, 1) for k in ctx.counts]
        )
        along = torch._foreach_div(sums, divisors)
        factors = torch._foreach_reciprocal(scales)
        shifts = torch._foreach_mul(torch._foreach_mul(means, factors), -1)
        found = [torch.addcmul(shift, x, factor) for shift, x, factor in zip(shifts, incoming, factors)]
        found = [x.addcmul_(y, along_y) for x, y, along_y in zip(found, made, along)]
        for i, x in zip(ctx.needed, cast(found, ctx.types)):
            returned[i] = x
        return tuple(returned)
