"""The weight of the distillation over time: a warm-up, an end, and a balance with the task's own gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from .errors import ConfigError
from .features import Features

__all__ = ["WEIGHTS", "WeightSchedule", "Weighting"]

WEIGHTS = ("fixed", "share")
START = 1e-3
"""The factor of the steps before the first measurement: the method's own scale is not known yet."""
MOMENTUM = 0.9
"""The momentum of the running estimate, in logarithms: a factor is a ratio."""
SCALE = "weighting.scale"
"""The entry of a shared weight in a state."""


@dataclass(frozen=True)
class WeightSchedule:
    """The factor that all losses of a distillation are multiplied by.

    Args:
        weight: ``"fixed"``, or ``"share"``: the factor is such that the distillation's gradient at the tapped levels
            has a share of the task's, by a running estimate. A departure from the papers.
        share: the ratio of the two gradients' norms.
        every: distilled steps between two measurements of the share.
        warmup: the factor rises linearly to its full value within so many steps.
        stop_at: the step from which nothing is distilled; 0 for never.

    Raises:
        ConfigError: a number is out of range.
    """

    weight: str = "fixed"
    share: float = 0.5
    every: int = 20
    warmup: int = 0
    stop_at: int = 0

    def __post_init__(self) -> None:
        if self.weight not in WEIGHTS:
            raise ConfigError("weight", self.weight, f"one of {', '.join(WEIGHTS)}")
        if not 0 < self.share < math.inf:
            raise ConfigError("share", self.share, "> 0 and finite")
        if self.every < 1:
            raise ValueError(f"{self.every} steps between two measurements")
        for name, value in (("warmup_iters", self.warmup), ("stop_at", self.stop_at)):
            if value < 0:
                raise ConfigError(name, value, ">= 0")

    @property
    def shared(self) -> bool:
        """The weight follows the gradients."""
        return self.weight == "share"


class Weighting:
    """The factor of each step, and the measurement that it follows.

    On a step that is measured, the method gets views of the student's maps. The gradient that arrives at a view is the
    distillation's alone; the one at the map is the whole; their difference is the task's. No second backward is needed,
    and a loss scaler cancels. The squared norms of all processes are added, so that all scale alike.

    Args:
        schedule: the settings.
    """

    def __init__(self, schedule: WeightSchedule) -> None:
        self.schedule = schedule
        self.scale = START if schedule.shared else 1.0
        self._factor = 1.0
        self._squares: dict[str, Tensor] = {}
        self._measured_before = False
        self._counting = False  # not while the method runs: gradients may be asked for there, to check it

    def save(self, state: dict[str, Any], prefix: str) -> None:
        """Add the scale of a shared weight to a state."""
        if not self.schedule.shared:
            return
        if not (distributed.is_available() and distributed.is_initialized()):
            self.update()  # else a resumed run would not know of the last measurement
        state[prefix + SCALE] = torch.tensor(self.scale, dtype=torch.float64)

    def load(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Resume from the scale of a state, if there is one, and return the state without it."""
        if SCALE in state and self.schedule.shared:
            self.scale, self._measured_before = float(state[SCALE]), True
        return {name: value for name, value in state.items() if name != SCALE}

    def __getstate__(self) -> dict[str, Any]:
        """Leave tensors of a step out of copies and pickles."""
        return {**self.__dict__, "_squares": {}}

    def ended(self, iteration: int) -> bool:
        """Say whether nothing is distilled any more."""
        return bool(self.schedule.stop_at) and iteration >= self.schedule.stop_at

    def factor(self, iteration: int) -> float:
        """Return the factor of a step, from 0."""
        warmup = self.schedule.warmup
        return self.scale * (min(1.0, (iteration + 1) / warmup) if warmup else 1.0)

    def weigh(self, losses: Mapping[str, Tensor], iteration: int) -> dict[str, Tensor]:
        """Return the losses times the factor of a step."""
        self._factor, self._counting = self.factor(iteration), True
        return dict(losses) if self._factor == 1 else {name: loss * self._factor for name, loss in losses.items()}

    def split(self, features: Features, iteration: int) -> dict[str, Tensor]:
        """Return the student's maps for the method; on a step that is measured, views whose gradient is noticed.

        Args:
            features: level -> map, with gradients.
            iteration: the step, from 0.
        """
        self.update()
        self._counting = False
        tracked = {level: x for level, x in features.items() if x.requires_grad}
        if not self.schedule.shared or iteration % self.schedule.every or not tracked:
            return dict(features)
        device = next(iter(tracked.values())).device
        self._squares = {part: torch.zeros((), device=device) for part in ("own", "task")}
        views = {level: x.view_as(x) for level, x in tracked.items()}
        for level, view in views.items():
            self._notice(tracked[level], view)
        return {**features, **views}

    def _notice(self, whole: Tensor, view: Tensor) -> None:
        seen: list[Tensor] = []
        squares = self._squares

        def own(gradient: Tensor) -> None:
            if not self._counting:
                return
            seen.append(gradient.detach())
            squares["own"] += gradient.detach().float().square().sum()

        def total(gradient: Tensor) -> None:
            if not self._counting:
                return
            task = gradient.detach() - seen.pop() if seen else gradient.detach()
            squares["task"] += task.float().square().sum()

        view.register_hook(own)  # type: ignore[no-untyped-call]
        whole.register_hook(total)  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """Take the last measurement into the estimate; all processes have to call it alike."""
        if not self._squares:
            return
        squares = torch.stack([self._squares["own"], self._squares["task"]])
        self._squares = {}
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(squares)
        own, task = squares.tolist()
        if not (own > 0 and task > 0 and math.isfinite(own) and math.isfinite(task)):
            return
        wanted = self.schedule.share * math.sqrt(task / own) * self._factor  # the measured gradient has that factor
        if self._measured_before:
            self.scale = math.exp(MOMENTUM * math.log(self.scale) + (1 - MOMENTUM) * math.log(wanted))
        else:
            self.scale, self._measured_before = wanted, True
