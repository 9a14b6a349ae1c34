"""Student-teacher feature fusion, which gives the map from which the masks are made.

A fusion is a class in ``FUSION_REGISTRY``, one of your own too. It is a module with these parts:

* a constructor ``(channels, *, query)``: both maps have ``channels``; ``query`` is ``"teacher"`` or ``"student"``;
* ``forward(student, teacher)``, from two maps, (N, C, H, W), to the fused map of the same shape.

Every parameter must get a gradient from the fused map. Pooling (``max_positions``) is for subclasses of
``CrossAttentionFusion`` alone, whose key/value source may be smaller than the query source.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.errors import ConfigError
from ...core.registry import FUSION_REGISTRY
from .attention import fused_attention, materialized_attention, summarized_attention
from .kernels import attend, joined, padded, projected, widths
from .paths import HALF, PATHS, attention_dtype, check_precision, chosen_path

__all__ = ["CrossAttentionFusion", "Summary", "TeacherFusion"]


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
        self._path = self._precision = "auto"

    @property
    def path(self) -> str:
        """The way in which attention is computed; the results of all ways are equal.

        * ``"auto"``: the cheapest, by the table in ``paths.py``;
        * ``"map"``: the whole map by torch's fused kernels;
        * ``"parts"``: the map in parts as wide as the queries, each by a fused kernel; it is never put together;
        * ``"summary"``: the projections, and the attention that every key receives, a block of rows of the matrix at a
          time;
        * ``"materialized"``: with the matrix written out, the reference.

        Where the masks need projections alone, ``"parts"`` and ``"summary"`` are one kernel for them.
        """
        return self._path

    @path.setter
    def path(self, path: str) -> None:
        if path not in PATHS:
            raise ConfigError("path", path, f"one of {', '.join(PATHS)}")
        self._path = path

    @property
    def precision(self) -> str:
        """The type in which attention is computed: ``"auto"``, or a name of ``PRECISIONS``.

        The masks are a sigmoid of a small projection of the result. ``"auto"`` takes bfloat16 on a GPU that has it,
        also where the student is trained in float32, and float32 everywhere else. Autocast's type comes before both.
        """
        return self._precision

    @precision.setter
    def precision(self, precision: str) -> None:
        check_precision(precision)
        self._precision = precision

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Fuse two (N, C, H, W) maps into one of the query source's size."""
        with self._computing(student):
            query_source, value_source = self._sources(student, teacher)
            if self.path != "materialized" and self._on_fast_kernels(student):
                fused = self._map(query_source, value_source)
            else:
                attention = materialized_attention if self.path == "materialized" else fused_attention
                fused = attention(self.query(query_source), self.key(value_source), self.value(value_source))
        return fused if torch.is_autocast_enabled(student.device.type) else fused.to(student.dtype)

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
        path = self._chosen(student, teacher, mean=mean)
        fast = self._on_fast_kernels(student)
        with self._computing(student):
            query_source, value_source = self._sources(student, teacher)
            if path == "parts":
                return self._by_parts(query_source, value_source, units)
            if path == "columns" and fast and units is not None:
                return self._by_columns(query_source, value_source, units)
            return self._by_blocks(query_source, value_source, units, mean=mean)

    def summarizes(self, student: Tensor, teacher: Tensor, *, mean: bool) -> bool:
        """Tell if ``summary`` is the way to the masks, by the path that was set or the table in ``paths.py``."""
        return self._chosen(student, teacher, mean=mean) not in ("map", "materialized")

    def _chosen(self, student: Tensor, teacher: Tensor, *, mean: bool) -> str:
        """Return the path, one of ``PATHS`` but ``"auto"``, or ``"columns"``."""
        if self.path != "auto":
            return self.path if mean or self.path in ("map", "materialized") else "columns"
        pairs = student.shape[2:].numel() * teacher.shape[2:].numel()
        dtype = attention_dtype(self.precision, student)
        return chosen_path(device=student.device.type, dtype=dtype, channels=student.shape[1], pairs=pairs, mean=mean)

    def _on_fast_kernels(self, features: Tensor) -> bool:
        """Say whether attention runs in half precision on a GPU, whose kernels want the layout of ``kernels.py``."""
        return features.device.type == "cuda" and attention_dtype(self.precision, features) in HALF

    def _computing(self, features: Tensor) -> AbstractContextManager[None]:
        """Return the context that gives products the type of ``precision``, where that is not the present one."""
        device, dtype = features.device.type, attention_dtype(self.precision, features)
        present = torch.is_autocast_enabled(device)
        if dtype in HALF and (present or not features.dtype == dtype == self.query.weight.dtype):
            return torch.autocast(device, dtype)
        return torch.autocast(device, enabled=False) if present and self.precision == "float32" else nullcontext()

    def _dtype(self, features: Tensor) -> torch.dtype:
        """Return the type of products with sources that ``_sources`` returned."""
        device = features.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return W_q, W_k and W_v as matrices."""
        query, key, value = (conv.weight.flatten(1) for conv in (self.query, self.key, self.value))
        return query, key, value

    def _positions(
        self, query_source: Tensor, value_source: Tensor, units: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the map, positions before channels, from its parts, and the units in its type.

        Returns:
            (N, Q, C), and (M, C).
        """
        query, key, value = self._weights()
        width, parts = widths(len(query), len(value))
        groups = [[(query, width)], [(key, width), (value, sum(parts))]]
        groups += [] if units is None else [[(units, len(units))]]
        weights = joined(groups, self._dtype(query_source))
        q, k_v = projected(query_source, weights[0]), projected(value_source, weights[1])
        k, *values = torch.split_with_sizes(k_v, [width, *parts], 2)
        outputs = [attend(q, k, v, len(query) ** -0.5) for v in values]
        fused = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
        fused = fused if fused.shape[2] == len(value) else fused[..., : len(value)]
        return fused, None if units is None else weights[2]

    def _map(self, query_source: Tensor, value_source: Tensor) -> Tensor:
        fused, _ = self._positions(query_source, value_source, None)
        return fused.transpose(1, 2).reshape(*fused.shape[::2], *query_source.shape[2:])

    def _by_parts(self, query_source: Tensor, value_source: Tensor, units: Tensor | None) -> Summary:
        """Compute projection and mean from the map, positions before channels."""
        fused, units = self._positions(query_source, value_source, units)
        mean = fused.mean(1, dtype=torch.promote_types(fused.dtype, torch.float32))[:, :, None, None]
        if units is None:
            return Summary(None, mean)
        # In this order the gradient of the map has the map's own layout, which the kernels want.
        projection = torch.bmm(fused, units.t().expand(len(fused), -1, -1)).transpose(1, 2)
        return Summary(projection.view(*projection.shape[:2], *query_source.shape[2:]), mean)

    def _by_columns(self, query_source: Tensor, value_source: Tensor, units: Tensor) -> Summary:
        """Compute the projection alone, as columns, by one fused kernel."""
        query, key, value = self._weights()
        width = padded(max(len(query), len(units)))
        groups = [[(query, width)], [(key, width), (units @ value, width)]]
        weights = joined(groups, self._dtype(query_source))
        q, k_u = projected(query_source, weights[0]), projected(value_source, weights[1])
        k, columns = torch.split_with_sizes(k_u, [width, width], 2)
        weighted = attend(q, k, columns, len(query) ** -0.5)[..., : len(units)]
        return Summary(weighted.transpose(1, 2).reshape(*weighted.shape[::2], *query_source.shape[2:]), None)

    def _by_blocks(self, query_source: Tensor, value_source: Tensor, units: Tensor | None, *, mean: bool) -> Summary:
        """Compute the projection as columns, and the mean by the received attention, a block of rows at a time."""
        query, key, weight = self.query(query_source), self.key(value_source), self.value.weight
        folded = weight[:0, :, 0, 0] if units is None else units @ weight[:, :, 0, 0]
        columns = torch.einsum("mc,nchw->nmhw", folded, value_source)
        if not mean:
            return Summary(fused_attention(query, key, columns), None)
        projection, received = summarized_attention(query, key, columns)
        pooled = (value_source.to(received.dtype) * received).sum((2, 3), keepdim=True)
        return Summary(None if units is None else projection, F.conv2d(pooled, weight.to(pooled.dtype)))

    def _sources(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return the query source and the key/value source, in the weights' type where nothing else casts them."""
        if not torch.is_autocast_enabled(student.device.type):
            student, teacher = (x.to(self.query.weight.dtype) for x in (student, teacher))
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
