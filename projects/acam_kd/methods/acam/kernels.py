"""Attention by torch's fused kernels in the layout that they want: (N, L, width), positions before channels.

One matrix product of a map with weights gives queries, or keys and values, in this layout; nothing large is copied or
padded. On a GPU in half precision the kernels are asked for in the order in which they were measured to be fast.

Letters: N images, Q query and K key positions, E and V channels, M columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .paths import HALF

__all__ = ["attend", "joined", "padded", "part_width", "projected", "widths"]

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


def joined(groups: Sequence[Sequence[tuple[Tensor, int]]], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Cast several weights together, and pad each with rows of zeros.

    Args:
        groups: of pairs of a (K, C) weight and the number of rows, at least K, that it gets.
        dtype: of the result.

    Returns:
        (rows, C) for each group, its weights one below the other; views of one tensor.
    """
    pairs = [pair for group in groups for pair in group]
    rows = [x if len(x) == n else F.pad(x, (0, 0, 0, n - len(x))) for x, n in pairs]
    whole = torch.cat([x.to(rows[0].dtype) for x in rows]).to(dtype)
    return torch.split_with_sizes(whole, [sum(n for _, n in group) for group in groups])


def projected(features: Tensor, weight: Tensor) -> Tensor:
    """Project a map, (N, C, H, W), by a (K, C) weight to (N, HW, K)."""
    return torch.bmm(features.flatten(2).transpose(1, 2), weight.t().expand(len(features), -1, -1))


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Compute softmax(scale Q K^T) V by a fused kernel.

    Args:
        query: (N, Q, E).
        key: (N, K, E).
        value: (N, K, V). Rows of all three must begin at multiples of 16 bytes: cuDNN's kernel is wrong without a
            word where they do not (measured on an H200), and others refuse.
        scale: of the products.

    Returns:
        (N, Q, V).
    """
    with _kernels(query, key):
        fused = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], scale=scale)
    fused = fused.squeeze(1)
    if fused.requires_grad:
        # Torch keeps the plans of cuDNN's backward without the gradient's layout in their key. With a gradient that was
        # a view of wider rows, a run on an H200 read outside of memory (docs/performance.md).
        fused.register_hook(Tensor.contiguous)  # type: ignore[no-untyped-call]
    return fused


def _kernels(query: Tensor, key: Tensor) -> AbstractContextManager[None]:
    """Ask for the kernels in the best order; one that does not take these inputs is passed over in silence."""
    if query.device.type != "cuda" or query.dtype not in HALF:
        return nullcontext()
    many = max(query.shape[1], key.shape[1]) >= MANY
    return sdpa_kernel(CUDNN_FIRST if many and _sound(query.device) else FLASH_FIRST, set_priority=True)


def _sound(device: torch.device) -> bool:
    """Tell if cuDNN's kernel is right for any number of positions, and fast, as torch itself judges it.

    Up to cuDNN 9.15.0 its backward was wrong for numbers that 128 does not divide.
    """
    version: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return (version or 0) > SOUND and torch.cuda.get_device_capability(device)[0] in HOPPER
