"""Single-head cross-attention between the positions of two maps, and cheaper ways to a summary of its result.

The matrix A = softmax(Q^T K / sqrt(E)) has one entry per pair of positions: 4.5e9 at P2 of an 800x1344 image. It is
never held as a whole. Two functions avoid it:

* ``fused_attention`` computes A V with torch's fused kernels: the whole map, or fewer columns. A projection m of the
  map is m (A V) = A (V m), so M projections need M columns instead of C.
* ``summarized_attention`` computes a few columns and the attention that every key receives: the mean over queries of
  its column of A. The values weighted by the received attention add up to the mean of the map over positions.

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

BLOCK = {"cpu": 2**18, "cuda": 2**26}
"""The number of entries of A held at a time: as many as fit a CPU's cache, or a GPU's memory."""
MIN_ROWS = {"cpu": 64, "cuda": 1024}
"""The smallest number of rows in a block: thinner blocks make slow matrix products."""


def materialized_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute A V with A written out: the reference, whose memory grows with the square of the positions.

    Arguments and result are those of ``fused_attention``.
    """
    rows = torch.einsum("neq,nek->nqk", query.flatten(2), key.flatten(2)) * query.shape[1] ** -0.5
    return torch.einsum("nqk,nck->ncq", rows.softmax(2), value.flatten(2)).view(*value.shape[:2], *query.shape[2:])


def fused_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute A V: for every query position the values weighted by softmax(q k / sqrt(E)).

    Torch's fused kernels need equal widths and a contiguous last dimension; on a GPU the width must be a multiple of 8.
    Otherwise they fall back to materialising A. So all three inputs are padded with zeros to such a width. The padding
    changes no product, and the scale is that of the true width.

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
    """Compute A times a few columns, and the mean attention that every key receives; in float32 at least.

    A is made a few rows at a time, and made again in the backward pass.

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
    """The operator Y = A U, r = mean over queries of A, for A = softmax(Q K^T).

    Shapes: Q (N, Q, E), K (N, K, E), U (N, K, M).

    With dY and dr given, dA = dY U^T + 1 dr^T / Q. This is the gradient of an attention with one column more: the
    column's value is dr, and the gradient of its output is 1 / Q. The softmax gives dS = A (dA - d). For every query,
    d = the sum over keys of A dA = dY . Y + A dr / Q, so d takes one column more again.
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
    """Return the images and queries of each block: of ``BLOCK`` entries of A, or ``MIN_ROWS`` rows of one image."""
    entries, least = (table.get(q.device.type, table["cuda"]) for table in (BLOCK, MIN_ROWS))
    keys = max(k.shape[1], 1)
    images = max(min(entries // (least * keys), len(q)), 1)
    rows = max(entries // (images * keys), least)
    return [
        (slice(n, n + images), slice(start, start + rows))
        for n in range(0, len(q), images)
        for start in range(0, q.shape[1], rows)
    ]
