"""Student-teacher feature fusion: the map from which the masks are made."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .registry import FUSION_REGISTRY

__all__ = ["CrossAttentionFusion", "TeacherFusion", "cross_attention"]


def cross_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Single-head attention from the positions of one map to those of another.

    The positions-by-positions matrix is never materialised. Torch's fused kernels need equal widths and
    a contiguous last dimension, and on a GPU a width that is a multiple of 8, and fall back to materialising it
    otherwise. So all three are padded with zeros to such a width, which changes no product, and the
    scale is that of the true width.

    Args:
        query: (N, E, Hq, Wq).
        key: (N, E, Hk, Wk).
        value: (N, C, Hk, Wk).

    Returns:
        (N, C, Hq, Wq): for every query position the values weighted by softmax(q k / sqrt(E)).
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


@FUSION_REGISTRY.register()
class CrossAttentionFusion(nn.Module):
    """STCA-FF: every position of one network attends to all positions of the other (ACAM-KD, arXiv 2503.06307).

    Q = W_q F_T, K = W_k F_S, V = W_v F_S; fused = softmax(Q^T K / sqrt(C/2)) V: one head, no residual, no
    norm, no positional code. That W_* are 1x1 convolutions without bias is a reading of the paper.

    Args:
        channels: C of both maps; queries and keys have C/2.
        query: ``"teacher"`` as in the paper, or ``"student"`` for its ablation.
    """

    def __init__(self, channels: int, *, query: str = "teacher") -> None:
        super().__init__()
        if query not in ("teacher", "student"):
            raise ValueError(f"query must be 'teacher' or 'student', not {query!r} (key: QUERY)")
        self.query_from = query
        reduced = max(channels // 2, 1)
        self.query = nn.Conv2d(channels, reduced, 1, bias=False)
        self.key = nn.Conv2d(channels, reduced, 1, bias=False)
        self.value = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Fuse two (N, C, H, W) maps into one of the query's size."""
        asks, answers = (teacher, student) if self.query_from == "teacher" else (student, teacher)
        return cross_attention(self.query(asks), self.key(answers), self.value(answers))


@FUSION_REGISTRY.register()
class TeacherFusion(nn.Module):
    """No fusion: the teacher's map alone (the ablation "adaptive masks from the teacher").

    Args:
        channels: C of both maps.
        query: only ``"teacher"``; there is nothing to ask the student.
    """

    def __init__(self, channels: int, *, query: str = "teacher") -> None:
        super().__init__()
        if query != "teacher":
            raise ValueError(f"TeacherFusion has no query from the {query} (key: QUERY; allowed: 'teacher')")

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the teacher's (N, C, H, W) map."""
        return teacher
