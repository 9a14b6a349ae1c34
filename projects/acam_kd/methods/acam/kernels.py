"""Attention by torch's fused kernels in the layout that they want: (N, L, width), positions before channels.

One matrix product of a map with weights gives queries, or keys and values, in this layout; nothing large is copied or
padded. On a GPU in half precision the kernels are asked for in the order in which they were measured to be fast.

Letters: N images, Q query and K key positions, E and V channels, M columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["attend", "joined", "padded", "part_width", "projected", "received_attention", "widths"]

CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
FLASH_FIRST = [CUDNN_FIRST[1], CUDNN_FIRST[0], *CUDNN_FIRST[2:]]
MANY = 4096
"""The number of positions from which cuDNN's kernel comes first. It is planned anew for every size of a map."""
SOUND = 91500
"""The version of cuDNN after which its kernel is right for all numbers of positions (PyTorch issue 169849)."""
HOPPER = (9, 10)
"""The major compute capabilities on which cuDNN's kernel is the fastest."""
NARROW = 128
"""The width up to which the kernels are fast: wider values are taken in parts."""
WIDEST = 256
"""The largest width of the queries that the fast kernels take."""
COLUMN_SCALE = 16.0
"""The received attention is summed by a kernel in half precision, over 16, since a sum over queries may be large."""


def padded(width: int) -> int:
    """Return the next multiple of 8: kernels need rows of 16 bytes."""
    return -(-width // 8) * 8


def part_width(reduced: int, channels: int) -> int:
    """Return the width of the parts in which values are taken.

    Args:
        reduced: E of the queries.
        channels: of the values.

    Example:
        >>> part_width(128, 256), part_width(9, 19), part_width(256, 512), part_width(1024, 2048)
        (128, 24, 256, 2048)
    """
    if max(reduced, channels) <= NARROW or reduced > WIDEST:
        return padded(max(reduced, channels))
    return padded(reduced)


def widths(reduced: int, channels: int) -> tuple[int, list[int]]:
    """Return the padded width of queries and keys, and those of the parts of the values, which are equal to it."""
    width = part_width(reduced, channels)
    return width, [width] * -(-channels // width)


def joined(weights: Sequence[tuple[Tensor, int]], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Cast several weights together, and pad each with rows of zeros.

    Args:
        weights: pairs of a (K, C) weight and the number of rows, at least K, that it gets.
        dtype: of the result.

    Returns:
        (rows, C) for each of the weights; views of one tensor.
    """
    rows = [x if len(x) == n else F.pad(x, (0, 0, 0, n - len(x))) for x, n in weights]
    whole = torch.cat([x.to(rows[0].dtype) for x in rows]).to(dtype)
    return torch.split_with_sizes(whole, [n for _, n in weights])


def projected(features: Tensor, weight: Tensor) -> Tensor:
    """Project a map, (N, C, H, W), by a (K, C) weight to (N, HW, K)."""
    return torch.bmm(features.flatten(2).transpose(1, 2), weight.t().expand(len(features), -1, -1))


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Compute softmax(scale Q K^T) V by a fused kernel.

    Args:
        query: (N, Q, E).
        key: (N, K, E).
        value: (N, K, V).
        scale: of the products.

    Returns:
        (N, Q, V).
    """
    with _kernels(query, key):
        fused = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], scale=scale)
    return fused.squeeze(1)


def _kernels(query: Tensor, key: Tensor) -> AbstractContextManager[None]:
    """Ask for the kernels in the best order; one that does not take these inputs is passed over in silence."""
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return nullcontext()
    many = max(query.shape[1], key.shape[1]) >= MANY
    return sdpa_kernel(CUDNN_FIRST if many and _sound(query.device) else FLASH_FIRST, set_priority=True)


def _sound(device: torch.device) -> bool:
    """Tell if cuDNN's kernel is right for any number of positions, and fast, as torch itself judges it.

    Up to cuDNN 9.15.0 its backward was wrong for numbers that 128 does not divide.
    """
    version: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return (version or 0) > SOUND and torch.cuda.get_device_capability(device)[0] in HOPPER


def received_attention(query: Tensor, key: Tensor, columns: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Compute A times a few columns, and the mean attention that every key receives, by fused kernels alone.

    The received attention is the gradient of one column's output with respect to its values, which the backward of a
    kernel gives. Its own gradient is that of an attention with one column more: ``attention._Summary`` has the algebra.

    Args:
        query: (N, Q, E).
        key: (N, K, E).
        columns: (N, K, M).
        scale: of the products.

    Returns:
        (N, Q, M), and (N, K) in float32 at least: the mean over queries of A, whose sum is 1 in every image.
    """
    if query.dtype == torch.float16:  # the gradient of a mean over positions leaves its range
        query, key, columns = (x.to(torch.bfloat16) for x in (query, key, columns))
    with torch.autocast(query.device.type, enabled=False):
        found: tuple[Tensor, Tensor] = _Received.apply(query, key, columns, scale)  # type: ignore[no-untyped-call]
    return found


class _Received(torch.autograd.Function):
    """The operator Y = A U, r = mean over queries of A, by two runs of a kernel forward and two backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, u: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        m = u.shape[2]
        value = _with_columns(q, k, u, u.new_zeros(*u.shape[:2], 1)).requires_grad_()
        with torch.enable_grad():
            y = attend(q.detach(), k.detach(), value, scale)
        ones = torch.zeros_like(y)
        ones[..., m] = 1 / COLUMN_SCALE
        (gradient,) = torch.autograd.grad(y, value, ones)
        dtype = torch.promote_types(q.dtype, torch.float32)
        received = gradient[..., m].to(dtype) * (COLUMN_SCALE / q.shape[1])
        ctx.save_for_backward(q, k, u)
        ctx.scale = scale
        return y.detach()[..., :m].contiguous(), received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dr: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, u = ctx.saved_tensors
        m = u.shape[2]
        # dr is the extra column and 1 / Q the gradient of its output; only their product counts.
        # A constant in the column changes no gradient of a softmax; without it half precision loses less.
        column = (dr - dr.mean(1, keepdim=True)).unsqueeze(2).to(u.dtype)
        value = _with_columns(q, k, u, column)
        with torch.autocast(q.device.type, enabled=False), torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, value)]
            y = attend(inputs[0], inputs[1], inputs[2], ctx.scale)
            gradient = torch.zeros_like(y)
            gradient[..., :m] = dy
            gradient[..., m] = 1 / q.shape[1]
            dq, dk, dv = torch.autograd.grad(y, inputs, gradient)
        return dq, dk, dv[..., :m], None


def _with_columns(q: Tensor, k: Tensor, u: Tensor, column: Tensor) -> Tensor:
    """Append a column to the values, and zeros up to a width that a fast kernel takes."""
    narrow = padded(u.shape[2] + 1)
    width = narrow
    if narrow != q.shape[2] and not _takes(q, k, narrow):
        width = max(q.shape[2], narrow)
    nothing = u.new_zeros(*u.shape[:2], width - u.shape[2] - 1)
    return torch.cat([u, column, nothing], 2)


def _takes(q: Tensor, k: Tensor, width: int) -> bool:
    """Tell if a fast kernel takes values that are narrower than queries and keys: cuDNN's does."""
    if q.device.type != "cuda" or max(q.shape[1], k.shape[1]) < MANY or not _sound(q.device):
        return False
    value = k.new_empty(len(k), 1, k.shape[1], width).requires_grad_()
    parameters = torch.backends.cuda.SDPAParams(q[:, None], k[:, None], value, None, 0.0, False, False)
    return bool(torch.backends.cuda.can_use_cudnn_attention(parameters))
