"""Distillation on images that nobody labelled: the student's tapped parts and the teacher, without the task's loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .checks import frozen_warning
from .comparison import Comparison
from .distiller import Distiller
from .errors import ConfigError
from .features import CLASSES
from .methods import SeveralMethods
from .reader import Reader, Step
from .scores import SCORES
from .taps import Call
from .targets import Targets

if TYPE_CHECKING:
    from .distillation import Distillation

__all__ = ["PREFIX", "Unlabelled", "keeping_statistics"]

PREFIX = "loss_unlabelled_"
"""The beginning of the names of the losses."""


class Unlabelled:
    """The comparison of student and teacher on unlabelled batches.

    Args:
        method: may consist of several; those that need annotations, or regions chosen by them, are left out.
        reader: the student's taps.

    Attributes:
        parts: the methods that are used.
        left_out: the name of each other method -> the reason, in words.
    """

    def __init__(self, method: Distiller, reader: Reader) -> None:
        by_regions = getattr(reader.class_head, "by_regions", False)
        reasons = [(part, _reason(part, by_regions=by_regions)) for part in method.parts()]
        self.parts = [part for part, reason in reasons if not reason]
        self.left_out = {type(part).__name__: reason for part, reason in reasons if reason}
        self._comparison: Comparison | None = None

    def check(self) -> None:
        """Raise ConfigError if no method is left."""
        if not self.parts:
            reasons = " and ".join(f"{name}, which {reason}" for name, reason in self.left_out.items())
            raise ConfigError(
                "method", f"{reasons}, for unlabelled images", "one that needs neither boxes nor labels",
                "choose one that learns from images alone, such as MGD or PKD",
            )  # fmt: skip

    def losses(self, distillation: Distillation, batch: Tensor, *, update_statistics: bool) -> dict[str, Tensor]:
        """Return the losses of a batch; see ``Distillation.unlabelled``."""
        self.check()
        _check(distillation, batch)
        if not distillation.distils:
            return {}
        network, extract = distillation._side
        keeping = nullcontext() if update_statistics else keeping_statistics(network)
        with distillation._attachment.resting(), keeping:
            features = extract(network, batch)
        comparison = self._prepare(distillation)
        step = Step(batch, dict(features), None, _call(batch))
        with _kept_steps(self.parts):
            compared = comparison.run(distillation.teacher, _joined(self.parts), step, Targets)
        if compared.frozen:
            distillation._warn("frozen", frozen_warning(compared.frozen))
        factor = distillation.weighting.factor(distillation.iteration)
        return {f"{PREFIX}{name.removeprefix('loss_')}": loss * factor for name, loss in compared.losses.items()}

    def _prepare(self, distillation: Distillation) -> Comparison:
        """Return the comparison of what is left; the first time, name what is left out."""
        if self._comparison is None:
            for name, reason in self.left_out.items():
                distillation._warn(f"unlabelled/{name}", f"{name} is left out on unlabelled images: it {reason}")
            used = {level for part in self.parts for level in part.levels}
            levels = {s: t for s, t in distillation.levels.items() if s in used}
            self._comparison = Comparison(levels, distillation.shapes, distillation.classes)
        return self._comparison


def _reason(part: Distiller, *, by_regions: bool) -> str:
    """Return the reason, in words, why a method cannot learn from images alone; empty if it can."""
    if needed := [need for need in part.needs if need != SCORES]:
        return f"needs {' and '.join(needed)}"
    if by_regions and CLASSES in part.levels:
        return "compares the classes of regions, which are chosen by labels"
    return ""


def _check(distillation: Distillation, batch: Tensor) -> None:
    hint = "call student.train(), and student.distillation.unlabelled(batch) beside a training step"
    if not distillation._student.training:
        raise ConfigError("student", "evaluation mode", "training mode", hint)
    if not torch.is_grad_enabled():
        raise ConfigError("student", "an unlabelled batch under no_grad", "gradients", hint)
    if not isinstance(batch, Tensor) or batch.dim() != 4 or not batch.is_floating_point():
        shape = f"{batch.dtype} {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
        raise ConfigError("batch", shape, "(N, C, H, W), normalised as the student's backbone gets it")


def _joined(parts: Sequence[Distiller]) -> Distiller:
    if len(parts) == 1:
        return parts[0]
    return SeveralMethods({type(part).__name__: part for part in parts})


def _call(batch: Tensor) -> Call:
    """Return a call as a tap would record it here, for autocast."""
    device = batch.device.type
    device = device if torch.amp.is_autocast_available(device) else "cpu"
    autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return Call((batch,), {}, None, autocast, True)


@contextmanager
def _kept_steps(parts: Sequence[Distiller]) -> Iterator[None]:
    """Let metrics and masks be those of the labelled step."""
    kept = [part._step for part in parts]
    for part in parts:
        part._step = {}
    try:
        yield
    finally:
        for part, step in zip(parts, kept):
            part._step = step


@contextmanager
def keeping_statistics(network: nn.Module) -> Iterator[None]:
    """Let batch normalisation use each batch's own statistics, and leave the running ones as they are."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    before = [(norm.track_running_stats, norm.momentum) for norm in norms]
    for norm in norms:  # no copy in place: backward would find the buffers changed
        norm.track_running_stats, norm.momentum = False, 0.0
    try:
        yield
    finally:
        for norm, (tracks, momentum) in zip(norms, before):
            norm.track_running_stats, norm.momentum = tracks, momentum
