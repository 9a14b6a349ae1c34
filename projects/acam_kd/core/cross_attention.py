"""Single-head cross-attention between the positions of two maps, and what of it can be had for less.

A = softmax(Q^T K / sqrt(E)) has as many entries as there are pairs of positions, 4.5e9 at P2 of an 800x1344 image, and
is never held as a whole. Two ways lead past it:

* ``fused_attention`` makes A V by torch's fused kernels: the whole map, or fewer columns. A projection m of the map is
  m (A V) = A (V m), so that M columns are enough where M projections are wanted, not C.
* ``summarized_attention`` makes a few columns and also what every key receives, the mean over queries of its column of
  A. That, times V, is the mean of the map over positions.

``materialized_attention`` is the definition, for tests and for the benchmark.

Letters: N images, E and C channels, Q query and K key positions, M columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["fused_attention", "materialized_attention", "summarized_attention"]

BLOCK = {"cpu": 2**18, "cuda": 2**25}
"""How many entries of A are held at a time: what a cache, or the memory of a GPU, has room for."""
MIN_ROWS = 64
"""Of a block: thinner ones make slow matrix products."""


def materialized_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A V with A written out: the reference. Memory grows with the square of the positions.

    Args and result are those of ``fused_attention``.
    """
    rows = torch.einsum("neq,nek->nqk", query.flatten(2), key.flatten(2)) * query.shape[1] ** -0.5
    return torch.einsum("nqk,nck->ncq", rows.softmax(2), value.flatten(2)).view(*value.shape[:2], *query.shape[2:])


def fused_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A V: for every query position the values weighted by softmax(q k / sqrt(E)).

    Torch's fused kernels need equal widths and a contiguous last dimension, and on a GPU a width that is a multiple of
    8, and fall back to materialising A otherwise. So all three are padded with zeros to such a width, which changes
    no product, and the scale is that of the true width.

    Args:
        query: (N, E, Hq, Wq).
        key: (N, E, Hk, Wk).
        value: (N, C, Hk, Wk).

    Returns:
        (N, C, Hq, Wq).
    """
    width = -(-max(query.shape[1], value.shape[1]) // 8) * 8

    def positions_first(x: Tensor) -> Tensor:  # (N, E, H, W) -> (N, 1, HW, width), contiguous
        x = x.flatten(2).transpose(1, 2).unsqueeze(1)
        return F.pad(x, (0, width - x.shape[-1])).contiguous()

    fused = F.scaled_dot_product_attention(
        positions_first(query), positions_first(key), positions_first(value), scale=query.shape[1] ** -0.5
    )
    n, channels, size = len(query), value.shape[1], query.shape[2:]
    return fused[:, 0, :, :channels].transpose(1, 2).reshape(n, channels, *size)


def summarized_attention(query: Tensor, key: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """A times a few columns, and the mean attention that every key receives; in float32 at least.

    A is made a few rows at a time, and again in the backward pass.

    Args:
        query: (N, E, Hq, Wq).
        key: (N, E, Hk, Wk).
        columns: (N, M, Hk, Wk); M may be 0.

    Returns:
        (N, M, Hq, Wq), and (N, 1, Hk, Wk): the mean over queries of the columns of A; its sum is 1 in every image.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        q, k, u = (x.to(dtype).flatten(2).transpose(1, 2).contiguous() for x in (query, key, columns))
        weighted, received = _Summary.apply(q * query.shape[1] ** -0.5, k, u)  # type: ignore[no-untyped-call]
    n, m = columns.shape[:2]
    return weighted.transpose(1, 2).reshape(n, m, *query.shape[2:]), received.view(n, 1, *key.shape[2:])


class _Summary(torch.autograd.Function):
    """Y = A U and r = mean over queries of A, for A = softmax(Q K^T) of Q (N, Q, E), K (N, K, E), U (N, K, M).

    With dY and dr given, dA = dY U^T + 1 dr^T / Q: the gradient of an attention with one column more, whose value is dr
    and whose output's gradient is 1 / Q. The softmax gives dS = A (dA - d), d = the sum over keys of A dA =
    dY . Y + A dr / Q for every query; d is one column more again.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        y, received = q.new_empty(*q.shape[:2], u.shape[2]), torch.zeros_like(k[..., 0])
        for n, rows in _blocks(q, k):
            attention = (q[n, rows] @ k[n].mT).softmax(2)
            y[n, rows] = attention @ u[n]
            received[n] += attention.sum(1)
        ctx.save_for_backward(q, k, u, y)
        return y, received / q.shape[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, u, y = ctx.saved_tensors
        dr = dr.unsqueeze(2) / q.shape[1]
        dq, dk, du = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(u)
        right = torch.cat([u, dr, torch.ones_like(dr)], 2)
        with torch.autocast(q.device.type, enabled=False):
            for n, rows in _blocks(q, k):
                attention = (q[n, rows] @ k[n].mT).softmax(2)
                du[n].baddbmm_(attention.mT, dy[n, rows])
                d = (dy[n, rows] * y[n, rows]).sum(2, keepdim=True) + attention @ dr[n]
                left = torch.cat([dy[n, rows], torch.ones_like(d), -d], 2)
                ds = (left @ right[n].mT).mul_(attention)
                dq[n, rows] = ds @ k[n]
                dk[n].baddbmm_(ds.mT, q[n, rows])
        return dq, dk, du


def _blocks(q: Tensor, k: Tensor) -> list[tuple[slice, slice]]:
    """Images and queries whose rows of A are held at once: of ``BLOCK`` entries, or ``MIN_ROWS`` rows of an image."""
    entries = BLOCK.get(q.device.type, BLOCK["cuda"])
    keys = max(k.shape[1], 1)
    images = max(min(entries // (MIN_ROWS * keys), len(q)), 1)
    rows = max(entries // (images * keys), MIN_ROWS)
    return [
        (slice(n, n + images), slice(start, start + rows))
        for n in range(0, len(q), images)
        for start in range(0, q.shape[1], rows)
    ]
