"""The check of all gradients between backward and step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from .errors import RunError

__all__ = ["clip_gradients"]


def clip_gradients(
    model: nn.Module,
    max_norm: float,
    *,
    when: str,
    losses: Iterable[Tensor] = (),
    explain: Callable[[], None] | None = None,
) -> None:
    """Clip the norm of all gradients together, and stop if it is not finite.

    torch's own ``clip_grad_norm_`` would spread one NaN over all gradients before its origin can be told. The losses
    are looked at here too, so that the host waits for the device once in a step.

    Args:
        model: the module whose gradients are clipped.
        max_norm: the largest norm allowed; 0 for any.
        when: the place that the error names, as "iteration 7".
        losses: 0-d tensors that must be finite as well.
        explain: called where something is not finite; raises the error of a loss.

    Raises:
        RunError: a gradient is not finite; the message names the parameters concerned.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
    norm = get_total_norm([p.grad for _, p in named if p.grad is not None])
    others = [loss.detach().to(norm) for loss in losses]
    if not bool(torch.stack([norm, *others]).isfinite().all() if others else norm.isfinite()):
        if explain is not None:
            explain()
        bad = [name for name, p in named if p.grad is not None and not bool(p.grad.isfinite().all())]
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise RunError(f"the gradient is not finite in {shown}", where=when)
    if max_norm:
        clip_grads_with_norm_([p for _, p in named], max_norm, norm)
