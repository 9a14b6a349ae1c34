"""The losses of all levels of a pyramid together: few kernels, where each level alone would take dozens.

They are the losses of ``losses.py``, level by level; only the order of sums differs. On a GPU a small kernel costs its
launch, and five levels of a detector have hundreds of them.

Letters: N images, C channels, H x W positions, M masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .losses import CONTRAST, CORRELATION_EPS, EPS, VARIANCE_EPS, check_form, check_shapes

__all__ = ["cast", "common_type", "mask_overlaps", "masked_errors", "mean_squared_errors"]

DIMS = {"spatial": (0, 2, 3), "channel": (0, 1)}
"""Kind -> the dimensions of the features that its masks share with them."""
AVERAGED = {"spatial": (1,), "channel": (2, 3)}
"""Kind -> the dimensions over which squared errors are averaged before the masks weigh the rest."""
Masks = Mapping[str, Tensor]


def masked_errors(student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Masks]) -> dict[str, Tensor]:
    """Compute the masked errors of ``losses.masked_mse`` for several levels.

    Args:
        student, teacher: (N, C, H, W) of each level; the teacher gets no gradient.
        masks: kind -> masks, of each level; all levels have the same kinds.

    Returns:
        Kind -> (levels,): the errors, in float32 at least.

    Raises:
        ValueError: the shapes do not fit each other.

    Example:
        >>> maps = [torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 2, 2)]
        >>> masks = [{"spatial": torch.ones(2, 6, *x.shape[2:])} for x in maps]
        >>> masked_errors(maps, [x + 2 for x in maps], masks)["spatial"]
        tensor([4.0000, 4.0000])
    """
    for own, theirs, of_level in zip(student, teacher, masks, strict=True):
        for kind, kind_masks in of_level.items():
            check_shapes(own, theirs, kind_masks, DIMS[kind])
    kinds = tuple(masks[0])
    with torch.autocast(student[0].device.type, enabled=False):
        energies = _Energies.apply(kinds, *student, *teacher)  # type: ignore[no-untyped-call]
        flat = {kind: _flat([of_level[kind] for of_level in masks]) for kind in kinds}
        numerators, sums = [], []
        for i, kind in enumerate(kinds):
            of_kind = energies[i * len(student) : (i + 1) * len(student)]
            runs = _runs(flat[kind])
            joined, of_kind = _joined(flat[kind], runs), _joined(of_kind, runs)
            squares = _per_level(joined, torch.square)
            numerators += [torch.bmm(m, e.unsqueeze(2)).flatten() for m, e in zip(squares, of_kind)]
            sums += [m.sum(2).flatten() for m in joined]
        ratios = torch.cat(numerators) / (torch.cat(sums) + EPS)
        errors = _means(ratios, [x.shape[:2].numel() for kind in kinds for x in flat[kind]])
    return dict(zip(kinds, errors.view(len(kinds), len(student))))


def mean_squared_errors(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Compute the mean squared error of each level over images, channels and positions: plain feature mimicking.

    Args:
        student, teacher: (N, C, H, W) of each level; the teacher gets no gradient.

    Returns:
        (levels,), in float32 at least; 0 for an empty level.

    Raises:
        ValueError: the shapes of a level differ.

    Example:
        >>> maps = [torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 2, 2)]
        >>> mean_squared_errors(maps, [x + 2 for x in maps])
        tensor([4., 4.])
    """
    for own, theirs in zip(student, teacher, strict=True):
        check_shapes(own, theirs)
    with torch.autocast(student[0].device.type, enabled=False):
        found: Tensor = _MeanSquares.apply(*student, *teacher)  # type: ignore[no-untyped-call]
        return found


def mask_overlaps(masks: Sequence[Tensor], form: str = "pairwise") -> Tensor:
    """Compute ``losses.mask_diversity_loss`` for several sets of masks.

    Args:
        masks: (N, M, ...) each.
        form: as there.

    Returns:
        (sets,), in float32 at least.

    Raises:
        ConfigError: the form is unknown.
    """
    check_form(form)
    with torch.autocast(masks[0].device.type, enabled=False):
        flat = _flat(masks)
        if form == "decorrelated":
            flat = [(x - x.mean(2, keepdim=True)) / max(x.shape[2], 1) ** 0.5 for x in flat]
        if len({x.shape[:2] for x in flat}) > 1:
            return torch.cat([_overlap(_Products.apply(x), form) for x in flat])  # type: ignore[no-untyped-call]
        return _overlap(_Products.apply(*flat), form)  # type: ignore[no-untyped-call]


def _overlap(inner: Tensor, form: str) -> Tensor:
    """Return the overlaps from the products of masks, (sets, N, M, M) -> (sets,)."""
    n, m = inner.shape[1:3]
    squares = inner.diagonal(dim1=2, dim2=3)
    if form == "ratio":
        pairs = inner.tril(-1).sum((2, 3)) / squares.sum(2).clamp_min(1e-12)
        return pairs.sum(1) * (2 / max(n, 1))
    if form == "decorrelated":  # of centred masks, whose products are covariances
        norms = squares[..., :, None] * squares[..., None, :] + CORRELATION_EPS
        pairs = (inner.square() / norms).tril(-1).sum((1, 2, 3)) * (2 / max(n * m * (m - 1), 1))
        contrast = (1 - (squares + VARIANCE_EPS).sqrt() / CONTRAST).relu()
        return pairs + contrast.sum((1, 2)) / max(n * m, 1)
    norms = (squares[..., :, None] + squares[..., None, :]).clamp_min(1e-12)
    return (inner / norms).tril(-1).sum((1, 2, 3)) * (4 / max(n * m * (m - 1), 1))


def _flat(masks: Sequence[Tensor]) -> list[Tensor]:
    """Return (N, M, K) masks in float32 at least, by one cast where they share a type."""
    flat = [x.flatten(2) for x in masks]
    dtype = torch.promote_types(flat[0].dtype, torch.float32)
    if all(x.dtype == dtype for x in flat):
        return flat
    return _per_level(flat, lambda x: x.to(dtype))


def _runs(masks: Sequence[Tensor]) -> list[int]:
    """Return the numbers of neighbouring levels whose masks have one shape: one kernel takes them all."""
    return [len(list(run)) for _, run in groupby(masks, key=lambda x: x.shape)]


def _joined(values: Sequence[Tensor], runs: Sequence[int]) -> list[Tensor]:
    """Put the values of each run of levels behind each other."""
    left = iter(values)
    parts = [list(islice(left, run)) for run in runs]
    return [torch.cat(part) if len(part) > 1 else part[0] for part in parts]


def _per_level(flat: Sequence[Tensor], function: Any) -> list[Tensor]:
    """Apply a function of single numbers to (N, M, K) tensors at once; their last dimensions may differ."""
    if len({x.shape[:2] for x in flat}) > 1 or len(flat) == 1:
        return [function(x) for x in flat]
    whole: Tensor = function(torch.cat(list(flat), 2))
    return list(torch.split_with_sizes(whole, [x.shape[2] for x in flat], 2))


def _means(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the mean of each run of values; 0 for an empty one."""
    if len(set(counts)) == 1:
        return values.view(len(counts), counts[0]).sum(1) / max(counts[0], 1)
    return torch.stack([part.sum() / max(len(part), 1) for part in torch.split_with_sizes(values, list(counts))])


class _Products(torch.autograd.Function):
    """The products X X^T of (N, M, K) masks, stacked: (sets, N, M, M)."""

    @staticmethod
    def forward(ctx: Any, *masks: Tensor) -> Tensor:
        ctx.runs = _runs(masks)
        joined = _joined(masks, ctx.runs)
        ctx.save_for_backward(*joined)
        products = torch.cat([torch.bmm(x, x.mT) for x in joined])
        return products.view(len(masks), len(masks[0]), *products.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        both = (gradient + gradient.mT).flatten(0, 1)
        saved = ctx.saved_tensors
        parts = torch.split_with_sizes(both, [len(x) for x in saved])
        found = [torch.split_with_sizes(torch.bmm(g, x), [len(x) // n] * n) for g, x, n in zip(parts, saved, ctx.runs)]
        return tuple(of_level for of_run in found for of_level in of_run)


class _Energies(torch.autograd.Function):
    """The squared error of every level, averaged over channels or over positions; its gradient is the student's alone.

    Forward (kinds, student's levels, teacher's levels) -> for each kind the levels' (N, HW) or (N, C).
    """

    @staticmethod
    def forward(ctx: Any, kinds: tuple[str, ...], *maps: Tensor) -> tuple[Tensor, ...]:
        student, teacher = maps[: len(maps) // 2], maps[len(maps) // 2 :]
        difference = _difference(student, teacher)
        squares = torch._foreach_mul(difference, difference)
        ctx.kinds, ctx.types = kinds, [x.dtype for x in student]
        ctx.save_for_backward(*difference)
        return tuple(x.mean(AVERAGED[kind]).flatten(1) for kind in kinds for x in squares)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        difference = ctx.saved_tensors
        factors: list[Tensor] = []
        for i, kind in enumerate(ctx.kinds):
            of_kind = list(gradients[i * len(difference) : (i + 1) * len(difference)])
            scaled = torch._foreach_mul(of_kind, [2 / max(_averaged(x, kind), 1) for x in difference])
            shaped = [_shared(x, like, kind) for x, like in zip(scaled, difference)]
            factors = [x + y for x, y in zip(factors, shaped)] if factors else shaped
        if _alike(difference, factors):
            found = list(torch._foreach_mul(difference, factors))
        else:
            found = [x * y for x, y in zip(difference, factors)]
        found = cast(found, ctx.types)
        return (None, *found, *[None] * len(found))


class _MeanSquares(torch.autograd.Function):
    """The mean squared error of every level; its gradient is the student's alone."""

    @staticmethod
    def forward(ctx: Any, *maps: Tensor) -> Tensor:
        student, teacher = maps[: len(maps) // 2], maps[len(maps) // 2 :]
        difference = _difference(student, teacher)
        ctx.types = [x.dtype for x in student]
        ctx.save_for_backward(*difference)
        sums = [x.sum() for x in torch._foreach_mul(difference, difference)]
        return torch.stack(torch._foreach_div(sums, [max(x.numel(), 1) for x in difference]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        difference = ctx.saved_tensors
        factors = torch._foreach_mul([*gradient.unbind()], [2 / max(x.numel(), 1) for x in difference])
        found = cast([x * factor for x, factor in zip(difference, factors)], ctx.types)
        return (*found, *[None] * len(found))


def _averaged(features: Tensor, kind: str) -> int:
    """Return the number of squared errors in each mean."""
    return features.shape[1] if kind == "spatial" else features.shape[2:].numel()


def _shared(gradient: Tensor, like: Tensor, kind: str) -> Tensor:
    """Return (N, HW) or (N, C) values in a form that spreads over (N, C, H, W) features."""
    n, c, h, w = like.shape
    return gradient.view((n, 1, h, w) if kind == "spatial" else (n, c, 1, 1))


def _alike(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(x.shape == y.shape for x, y in zip(some, others))


def _difference(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[Tensor]:
    """Return student - teacher in float32 at least."""
    dtype = common_type((*student, *teacher))
    ours, theirs = (cast(maps, [dtype] * len(maps)) for maps in (student, teacher))
    return list(torch._foreach_sub(ours, theirs))


def common_type(maps: Sequence[Tensor]) -> torch.dtype:
    """Return the type that holds all maps, float32 at least."""
    dtype = torch.float32
    for x in maps:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def cast(maps: Sequence[Tensor], types: Sequence[torch.dtype]) -> list[Tensor]:
    """Cast maps, those that need it by one kernel."""
    made = [torch.empty_like(x, dtype=dtype) for x, dtype in zip(maps, types) if x.dtype != dtype]
    if made:
        torch._foreach_copy_(made, [x for x, dtype in zip(maps, types) if x.dtype != dtype])
    left = iter(made)
    return [x if x.dtype == dtype else next(left) for x, dtype in zip(maps, types)]
