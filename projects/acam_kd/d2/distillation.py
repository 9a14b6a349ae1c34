"""The Detectron2 side of a distilled step: iterations, logs, pictures and checks, where there is an event storage."""

from __future__ import annotations

import logging
from typing import Any

from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor

from ..core import Distillation
from ..core.outputs import losses_of
from .names import key
from .visualize import put_masks

__all__ = ["D2Distillation"]

logger = logging.getLogger("detectron2.acam_kd")

LINES = """
    from acam_kd.d2 import checkpoint_distiller
    checkpoint_distiller(checkpointer)  # before checkpointer.resume_or_load
"""


class D2Distillation(Distillation):
    """A distillation whose iteration is the trainer's, and that writes into Detectron2's event storage.

    Without a storage, in a loop of one's own, steps are counted and nothing is written.

    Args:
        log_period: iterations between two records of the metrics.
        vis_period: iterations between two pictures of the spatial masks in the event storage; 0 for none; the
            student's own ``vis_period`` if left out.
        arguments: see ``Distillation``.
    """

    logger = logger
    names = staticmethod(key)

    def __init__(self, *, log_period: int = 20, vis_period: int | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        student = self._student
        self.log_period = log_period
        self.vis_period = int(getattr(student, "vis_period", 0) or 0) if vis_period is None else vis_period
        self.input_format = getattr(student, "input_format", None) or "BGR"
        self.deferred = False
        """The engine calls ``check_losses`` after the backward: to wait for the device earlier would leave it idle."""
        self._unchecked: dict[str, Tensor] = {}
        self._new = True  # what the method has learnt, until it was loaded or used

    def _begin(self) -> None:
        if has_event_storage():
            self.iteration = get_event_storage().iter
        super()._begin()

    def _end(self, args: Any, kwargs: Any, output: Any) -> None:
        self._unchecked = {name: loss.detach() for name, loss in losses_of(output).items()}
        if not self.deferred:
            self.check_losses()
        if not has_event_storage():
            return
        if self._new and self.iteration > 0:
            logger.warning(
                "training resumes at iteration %d with a NEW distiller: the checkpoint has none, or it was not loaded. "
                "These lines keep it:\n%s", self.iteration, LINES.strip("\n"),
            )  # fmt: skip
        self._new = False
        if self.last_of(self.log_period):
            self._log()
        batched_inputs: Any = args[0] if args else next(iter(kwargs.values()), None)
        if self.vis_period > 0 and self.first_of(self.vis_period) and comm.is_main_process():
            put_masks(self, batched_inputs)

    def check_later(self, losses: dict[str, Tensor]) -> None:
        """Check further losses of this step as well, now or after the backward."""
        self._unchecked.update({name: loss.detach() for name, loss in losses.items()})
        if not self.deferred:
            self.check_losses()

    def check_losses(self) -> None:
        """Raise RunError if a loss of the last step is not finite."""
        losses, self._unchecked = self._unchecked, {}
        if losses:
            self.raise_if_not_finite(losses, when=f"iteration {self.iteration}")

    def __getstate__(self) -> dict[str, Any]:
        """Leave the losses of a step out of copies and pickles."""
        return {**super().__getstate__(), "_unchecked": {}}

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load what a method has learnt; it is not new then."""
        loaded = super().load_state_dict(*args, **kwargs)
        self._new = False
        return loaded

    def _log(self) -> None:
        values = {name: float(value) for name, value in self.metrics().items()}
        get_event_storage().put_scalars(smoothing_hint=False, **{f"distill/{k}": v for k, v in values.items()})
        by_level: dict[str, list[str]] = {}
        for name, value in values.items():
            level, _, quantity = name.rpartition("/")
            by_level.setdefault(level, []).append(f"{quantity} {value:.4g}")
        logger.info("\n".join(f"{level or 'distill'}: {'  '.join(v)}" for level, v in by_level.items()))
        for place, warning in self.warnings(key).items():
            self._warn(place, warning)
