"""Student-teacher feature fusion, which gives the map from which the masks are made.

A fusion is a class in ``FUSION_REGISTRY``, one of your own too. It is a module with these parts:

* a constructor ``(channels, *, query)``: both maps have ``channels``; ``query`` is ``"teacher"`` or ``"student"``;
* ``forward(student, teacher)``, from two maps, (N, C, H, W), to the fused map of the same shape.

Every parameter must get a gradient from the fused map. Pooling (``max_positions``) is for subclasses of
``CrossAttentionFusion`` alone, whose key/value source may be smaller than the query source.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.errors import ConfigError
from ...core.registry import FUSION_REGISTRY
from .attention import fused_attention, materialized_attention, summarized_attention

__all__ = ["CrossAttentionFusion", "Summary", "TeacherFusion"]


PATHS = ("auto", "map", "summary", "materialized")
WIDE = 64
"""The number of channels from which the summary of a map is cheaper than the map."""
HALF = (torch.float16, torch.bfloat16)


class Summary(NamedTuple):
    """The parts of a fused map that the masks need."""

    projection: Tensor | None
    """The map projected on the units, (N, M, H, W)."""
    mean: Tensor | None
    """The mean over positions, (N, C, 1, 1)."""


@FUSION_REGISTRY.register()
class CrossAttentionFusion(nn.Module):
    """Cross-attention, STCA-FF: every position of one network attends to all positions of the other.

    ACAM-KD, arXiv 2503.06307, defines it as

        Q = W_q F_T,    K = W_k F_S,    V = W_v F_S,    fused = softmax(Q^T K / sqrt(C/2)) V

    There is one head, no residual, no norm and no positional code. The W_* are 1x1 convolutions without bias. That is
    an assumption; the paper does not say.

    Args:
        channels: C of both maps; queries and keys have C/2.
        query: the query source: ``"teacher"`` as in the paper, or ``"student"`` for its ablation. The other network
            gives keys and values.

    Attributes:
        query, key, value: the convolutions W_q, W_k and W_v.

    Raises:
        ConfigError: an unknown query source.

    Example:
        >>> fusion = CrossAttentionFusion(64, query="teacher")
        >>> student, teacher = torch.randn(2, 64, 4, 5), torch.randn(2, 64, 4, 5)
        >>> fusion(student, teacher).shape, fusion.value.weight.shape
        (torch.Size([2, 64, 4, 5]), torch.Size([64, 64, 1, 1]))
    """

    def __init__(self, channels: int, *, query: str = "teacher") -> None:
        super().__init__()
        if query not in ("teacher", "student"):
            raise ConfigError("query", query, "teacher or student")
        self.query_from = query
        reduced = max(channels // 2, 1)
        self.query = nn.Conv2d(channels, reduced, 1, bias=False)
        self.key = nn.Conv2d(channels, reduced, 1, bias=False)
        self.value = nn.Conv2d(channels, channels, 1, bias=False)
        self._path = "auto"

    @property
    def path(self) -> str:
        """The way in which attention is computed; the results of all ways are equal.

        * ``"auto"``: the cheapest;
        * ``"map"``: the whole map by torch's fused kernels;
        * ``"summary"``: without the map wherever it is not needed;
        * ``"materialized"``: with the matrix written out, the reference.
        """
        return self._path

    @path.setter
    def path(self, path: str) -> None:
        if path not in PATHS:
            raise ConfigError("path", path, f"one of {', '.join(PATHS)}")
        self._path = path

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Fuse two (N, C, H, W) maps into one of the query source's size."""
        query_source, value_source = self._sources(student, teacher)
        attend = materialized_attention if self.path == "materialized" else fused_attention
        return attend(self.query(query_source), self.key(value_source), self.value(value_source))

    def summary(self, student: Tensor, teacher: Tensor, units: Tensor | None, *, mean: bool) -> Summary:
        """Compute the parts of the fused map that masks need, without the map.

        The result is exact but for the order of the sums. The projection on units m is m (A V) = A (V m) =
        A ((m W_v) F): it takes M columns instead of C, and no values. The mean over positions is W_v times a mean of F
        whose weights are the attention that every position receives.

        Args:
            student, teacher: (N, C, H, W).
            units: (M, C), or None where no projection is wanted.
            mean: True where the mean is wanted.
        """
        query_source, value_source = self._sources(student, teacher)
        query, key, weight = self.query(query_source), self.key(value_source), self.value.weight
        folded = weight[:0, :, 0, 0] if units is None else units @ weight[:, :, 0, 0]
        columns = torch.einsum("mc,nchw->nmhw", folded, value_source)
        if not mean:
            return Summary(fused_attention(query, key, columns), None)
        projection, received = summarized_attention(query, key, columns)
        pooled = (value_source.to(received.dtype) * received).sum((2, 3), keepdim=True)
        return Summary(None if units is None else projection, F.conv2d(pooled, weight.to(pooled.dtype)))

    def summarizes(self, features: Tensor, *, mean: bool) -> bool:
        """Tell if ``summary`` is the cheaper way to the masks, for (N, C, H, W) features of that device and type.

        Without the mean it always is: M columns are fewer than C. With the mean it is not cheaper where the map is
        narrow (measured on a CPU), nor in half precision on a GPU (not measured): torch's kernels run on tensor cores
        there, and ``summarized_attention`` has no kernel of its own.
        """
        if self.path != "auto":
            return self.path == "summary"
        half = features.dtype in HALF or torch.is_autocast_enabled(features.device.type)
        return not mean or (features.shape[1] >= WIDE and not (half and features.is_cuda))

    def _sources(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return the query source and the key/value source."""
        return (teacher, student) if self.query_from == "teacher" else (student, teacher)


@FUSION_REGISTRY.register()
class TeacherFusion(nn.Module):
    """The teacher's map alone, without fusion (the ablation "adaptive masks from the teacher").

    Args:
        channels: C of both maps.
        query: only ``"teacher"``: there is no attention, so the student cannot be its query source.

    Raises:
        ConfigError: another query source.
    """

    def __init__(self, channels: int, *, query: str = "teacher") -> None:
        super().__init__()
        if query != "teacher":
            raise ConfigError("query", query, "teacher, the only source that TeacherFusion has")

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the teacher's (N, C, H, W) map."""
        return teacher
