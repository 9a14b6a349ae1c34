"""The floating-point operations of a distiller, counted in two ways.

fvcore's counter reads a trace of the forward and counts one multiply-add as one. It sees neither the backward nor the
inside of a custom autograd function. torch's counter sees every operator that runs, forward and backward, and counts a
multiply-add as two. Both count products and convolutions only; fvcore's counts some normalisations too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from acam_kd.core import Distiller, Targets
from acam_kd.core.features import Features

__all__ = ["count", "distiller_flops", "fvcore_flops"]

ATTENTION = "aten::scaled_dot_product_attention"


def _attention_on_cpu(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)  # type: ignore[no-untyped-call, no-any-return]


def _attention_on_cpu_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)  # type: ignore[no-untyped-call, no-any-return]


def _product_added(total: Any, left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    n, rows, inner = left
    return int(2 * n * rows * inner * right[2])


# torch's counter knows neither the attention of CPUs nor products that add in place.
UNKNOWN_TO_TORCH = {
    torch.ops.aten.baddbmm_: _product_added,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_on_cpu_backward,
}


def count(function: Callable[[], Any]) -> tuple[int, Any]:
    """Count the FLOPs of all operators that a function runs; return them and the function's result.

    A multiply-add counts as two.
    """
    with FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_TORCH) as counter:
        result = function()
    return counter.get_total_flops(), result


def distiller_flops(distiller: Distiller, student: Features, teacher: Features, targets: Targets) -> dict[str, Any]:
    """Count the FLOPs of one call: by torch forward and backward, by fvcore forward only.

    Args:
        distiller: the method.
        student, teacher: (N, C, H, W) per level.
        targets: the targets that the method needs.

    Returns:
        ``forward`` and ``backward``: FLOPs. ``fvcore_forward``: multiply-adds, or None if it cannot be traced.
        ``fvcore_uncounted``: operator -> number of calls that were not counted.
    """
    student = {level: x.detach().requires_grad_() for level, x in student.items()}
    forward, losses = count(lambda: sum(distiller(student, teacher, targets).values()))
    backward, _ = count(losses.backward)
    traced, uncounted = fvcore_flops(distiller, student, teacher, targets)
    return {"forward": forward, "backward": backward, "fvcore_forward": traced, "fvcore_uncounted": uncounted}


def fvcore_flops(
    distiller: Distiller, student: Features, teacher: Features, targets: Targets
) -> tuple[float | None, dict[str, int]]:
    """Count the multiply-adds of the forward by fvcore, and the calls of each operator that it does not count."""
    traced = _Traced(distiller, list(student), targets)
    analysis = FlopCountAnalysis(traced, (*student.values(), *(teacher[level] for level in student)))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    analysis.set_op_handle(ATTENTION, _attention)
    try:
        return float(analysis.total()), dict(analysis.unsupported_ops())
    except RuntimeError as error:  # from the tracer
        return None, {str(error).strip().splitlines()[0]: 1}


class _Traced(nn.Module):
    """A distiller whose inputs are tensors only, as a trace needs them."""

    def __init__(self, distiller: Distiller, levels: list[str], targets: Targets) -> None:
        super().__init__()
        self.distiller, self.levels, self.targets = distiller, levels, targets

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        count = len(self.levels)
        student, teacher = (dict(zip(self.levels, part)) for part in (features[:count], features[count:]))
        losses: Mapping[str, Tensor] = self.distiller(student, teacher, self.targets)
        return tuple(losses.values())


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Count the multiply-adds of q k^T and of its product with v, for fvcore."""
    query, key, value = (x.type().sizes() for x in inputs[:3])
    batch = 1
    for size in query[:-2]:
        batch *= size
    return int(batch * query[-2] * key[-2] * (query[-1] + value[-1]))
