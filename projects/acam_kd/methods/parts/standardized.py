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
        Maps of the same shapes, in float32 at least, with gradients. Those of one shape share their memory: change none
        in place.

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
        ctx.set_materialize_grads(False)
        counts = [x.numel() // x.shape[1] for x in maps]
        same: dict[torch.Size, list[int]] = {}
        for i, x in enumerate(maps):
            same.setdefault(x.shape, []).append(i)  # student and teacher of a level, which share their kernels
        groups, dtype = list(same.values()), common_type(maps)
        stacks = [_stack(maps[of[0]], len(of), dtype) for of in groups]
        found = _rows(stacks, groups)
        torch._foreach_copy_(found, list(maps))
        corrections = [int(counts[of[0]] > 1) for of in groups]
        moments = [torch.std_mean(x, (1, 3, 4), correction=c, keepdim=True) for x, c in zip(stacks, corrections)]
        divisors = list(torch._foreach_add([deviation for deviation, _ in moments], DEVIATION_EPS))
        for x, (_, mean), divisor in zip(stacks, moments, divisors):
            x.sub_(mean).div_(divisor)
        deviations, scales = _rows([deviation for deviation, _ in moments], groups), _rows(divisors, groups)
        ctx.needed = [i for i, x in enumerate(maps) if x.requires_grad]
        ctx.types = [maps[i].dtype for i in ctx.needed]
        ctx.counts = [counts[i] for i in ctx.needed]
        ctx.save_for_backward(*(part for i in ctx.needed for part in (found[i], deviations[i], scales[i])))
        ctx.mark_non_differentiable(*(x for i, x in enumerate(found) if i not in ctx.needed))
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


def _stack(x: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Allocate (count, N, C, H, W) for maps like this one, in its order of memory: channels last stay last."""
    n, c, h, w = x.shape
    if x.is_contiguous():
        return x.new_empty((count, n, c, h, w), dtype=dtype)
    return x.new_empty((count, n, h, w, c), dtype=dtype).permute(0, 1, 4, 2, 3)


def _rows(stacks: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the rows of stacked tensors in the order of the maps, whose numbers each group lists."""
    rows = {i: row for stack, of in zip(stacks, groups) for i, row in zip(of, stack.unbind())}
    return [rows[i] for i in range(len(rows))]
