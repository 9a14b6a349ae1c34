"""Student-teacher feature fusion: the map from which the masks are made."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cross_attention import fused_attention, materialized_attention, summarized_attention
from .registry import FUSION_REGISTRY

__all__ = ["CrossAttentionFusion", "Summary", "TeacherFusion"]


PATHS = ("auto", "map", "summary", "materialized")
WIDE = 64
"""Channels from which the summary of a map is cheaper than the map."""
HALF = (torch.float16, torch.bfloat16)


class Summary(NamedTuple):
    """What masks need of a fused map."""

    projection: Tensor | None
    """(N, M, H, W), on units."""
    mean: Tensor | None
    """(N, C, 1, 1), over positions."""


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
        self._path = "auto"

    @property
    def path(self) -> str:
        """How attention is computed; to compare the ways, whose results are equal.

        ``"auto"``, by what is cheapest; ``"map"``, the whole map by torch's fused kernels; ``"summary"``, without the
        map wherever it is not needed; ``"materialized"``, with the matrix written out, the reference.
        """
        return self._path

    @path.setter
    def path(self, path: str) -> None:
        if path not in PATHS:
            raise ValueError(f"path must be one of {PATHS}, not {path!r}")
        self._path = path

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Fuse two (N, C, H, W) maps into one of the query's size."""
        asks, answers = self._roles(student, teacher)
        attend = materialized_attention if self.path == "materialized" else fused_attention
        return attend(self.query(asks), self.key(answers), self.value(answers))

    def summary(self, student: Tensor, teacher: Tensor, units: Tensor | None, *, mean: bool) -> Summary:
        """What masks need of the fused map, without the map: exactly, but for the order of the sums.

        Its projection on units m is m (A V) = A (V m) = A ((m W_v) F): M columns instead of C, and no values. Its
        mean over positions is W_v times the mean of F weighted by what every position receives of A.

        Args:
            student, teacher: (N, C, H, W).
            units: (M, C), or None where no projection is wanted.
            mean: whether the mean is wanted.
        """
        asks, answers = self._roles(student, teacher)
        query, key, weight = self.query(asks), self.key(answers), self.value.weight
        folded = weight[:0, :, 0, 0] if units is None else units @ weight[:, :, 0, 0]
        columns = torch.einsum("mc,nchw->nmhw", folded, answers)
        if not mean:
            return Summary(fused_attention(query, key, columns), None)
        projection, received = summarized_attention(query, key, columns)
        pooled = (answers.to(received.dtype) * received).sum((2, 3), keepdim=True)
        return Summary(None if units is None else projection, F.conv2d(pooled, weight.to(pooled.dtype)))

    def summarizes(self, features: Tensor, *, mean: bool) -> bool:
        """Whether ``summary`` is the cheaper way to the masks, for (N, C, H, W) features of that device and type.

        Always where no mean is wanted: M columns are fewer than C. With it not where the map is narrow (measured on a
        CPU), and not in half precision on a GPU (not measured): ``summarized_attention`` has no kernel of its own, and
        torch's run on tensor cores there.
        """
        if self.path != "auto":
            return self.path == "summary"
        half = features.dtype in HALF or torch.is_autocast_enabled(features.device.type)
        return not mean or (features.shape[1] >= WIDE and not (half and features.is_cuda))

    def _roles(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Who asks and who answers."""
        return (teacher, student) if self.query_from == "teacher" else (student, teacher)


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
