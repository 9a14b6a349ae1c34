"""The exponential moving average of a student's weights, which often predicts better than the last ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["Average"]


class Average:
    """A moving average of a model's state, floating-point buffers included; the rest is the model's own.

    The decay rises to its value, as ``(1 + t) / (10 + t)`` after t updates, so that short runs do not keep their start.

    Args:
        model: its state at the time is the start.
        decay: of the average at each step, below 1; 0 for no average.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> average = Average(model, 0.5)
        >>> for value in (0.0, 1.0):
        ...     _ = nn.init.constant_(model.weight, value)
        ...     average.update()
        >>> with average.applied():
        ...     inside = model.weight.item()
        >>> inside, model.weight.item()
        (0.75, 1.0)
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.updates = 0
        self.tensors = {name: value.detach().clone() for name, value in self._own().items()}

    def _own(self) -> dict[str, Tensor]:
        """Return the tensors that are averaged, those of the model itself."""
        state = self.model.state_dict() if self.decay else {}
        return {name: value for name, value in state.items() if value.is_floating_point()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        if not self.decay:
            return
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in self._own().items():
            self.tensors[name].lerp_(value.to(self.tensors[name]), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights for as long as the context lasts."""
        own = self._own()
        before = {name: value.detach().clone() for name, value in own.items()}
        try:
            _copy(self.tensors, own)
            yield
        finally:
            _copy(before, own)

    def restart(self) -> None:
        """Begin anew with the model's weights of now."""
        self.load_state_dict({})

    def state_dict(self) -> dict[str, object]:
        """Return the average for a checkpoint; empty without one."""
        return {"updates": self.updates, "tensors": self.tensors} if self.decay else {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over the average of a checkpoint; without one it begins with the model's weights of now."""
        tensors = state.get("tensors")
        self.updates = int(str(state.get("updates", 0)))
        _copy(tensors if isinstance(tensors, dict) else self._own(), self.tensors)


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, value in target.items():
        value.copy_(source[name])
