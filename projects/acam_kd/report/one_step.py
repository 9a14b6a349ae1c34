"""One forward and backward pass of a student, with what it says of the run that is to come."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ..core import Distillation
from ..core.errors import ConfigError, Names
from ..core.returned import HIGH, lowered
from .health import Part, peak_memory

__all__ = ["look_at_step"]


def look_at_step(part: Part, student: nn.Module, *batch: Any, names: Names = str) -> None:
    """Make one step without a change of a weight, and note losses, gradients, time and memory.

    Args:
        part: gets the findings.
        student: in training mode, perhaps with a distillation.
        *batch: the arguments of its forward pass, which returns a dict of losses.
        names: the front end's names of arguments.

    Raises:
        ConfigError: the method gets no gradient into the student.
        RunError: a loss is not finite.
    """
    started = perf_counter()
    losses: dict[str, Tensor] = student(*batch)
    attached = getattr(student, "distillation", None)
    if isinstance(attached, Distillation):
        attached.raise_if_not_finite(losses, when="one step")
        _look_at_gradients(part, student, attached, losses)
        _look_at_ratio(part, attached, names)
    total = torch.stack([loss.float() for loss in losses.values()]).sum()
    total.backward()  # type: ignore[no-untyped-call]
    seconds = perf_counter() - started
    values = [f"{name.removeprefix('loss_')} {loss.detach().item():.3g}" for name, loss in losses.items()]
    part.ok(f"losses: {'  '.join(values)}")
    if not all(bool(torch.isfinite(p.grad).all()) for p in student.parameters() if p.grad is not None):
        part.broken("a gradient is not finite")
    device = next(student.parameters()).device.type
    memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else peak_memory()
    part.ok(f"{seconds:.1f} s on this {device}, the first of its kind; peak memory {memory:.2f} GiB")


def _look_at_gradients(part: Part, student: nn.Module, attached: Distillation, losses: dict[str, Tensor]) -> None:
    own = {name: losses[name] for name in attached.losses if name in losses}
    if not own:
        part.look("the method has no losses in the first step")
        return
    learnt = {id(p) for p in attached.parameters()}
    parameters = [p for p in student.parameters() if p.requires_grad and id(p) not in learnt]
    total = torch.stack([loss.float() for loss in own.values()]).sum()
    found = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
    reached = [g for g in found if g is not None and bool(g.any())]
    if not reached:
        raise ConfigError("method", "losses without a gradient", "a gradient into the student", "see {taps}")
    norm = float(torch.stack([g.float().norm() for g in reached]).norm())
    part.ok(
        f"the method's gradient reaches {len(reached)} of {len(parameters)} of the student's tensors, norm {norm:.3g}"
    )


def _look_at_ratio(part: Part, attached: Distillation, names: Names) -> None:
    """Compare the method's losses that reach the student with the task's."""
    ratio = attached.metrics().get("distillation_to_task")
    if ratio is None:  # the task has no loss here
        return
    found = f"the method's losses are {float(ratio):.3g} times the task's"
    if ratio <= HIGH:
        part.ok(found)
        return
    part.look(f"{found}: if they stay above {HIGH} times, {lowered(attached.method, names)}")
