"""How features, and what else happens inside of a model, are intercepted without subclassing it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from .features import Features

__all__ = ["FeatureTap", "MethodTap"]


class FeatureTap:
    """Reads what goes into and comes out of a module, without subclassing it.

    Recording happens in training mode only. The hook is a bound method, so a deep copy of a model that
    owns both the tap and the module carries its own working pair.

    Args:
        module: returns a mapping from level name to (N, C, H, W), as the backbones of Detectron2 and
            torchvision do, or a single map if ``level`` is given.
        level: the name for a single map.
    """

    def __init__(self, module: nn.Module, *, level: str = "") -> None:
        self._level = level
        self._recorded: tuple[Tensor, Features] | None = None
        self._times = 0
        self._handle = module.register_forward_hook(self._record)

    def _record(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not module.training:
            return
        if self._level and isinstance(output, Tensor):
            output = {self._level: output}
        if not isinstance(output, Mapping):
            raise TypeError(
                f"{type(module).__name__} returned {type(output).__name__}; a mapping from level name to "
                "feature map is needed"
            )
        self._recorded = (args[0], output)
        self._times += 1

    def pop(self) -> tuple[Tensor, Features]:
        """Return ``(batch, features)`` of the last training forward, and forget them.

        Raises:
            RuntimeError: nothing was recorded since the last call, because the tapped module did not run or
                ran in evaluation mode; or it ran more than once, and which features are meant is unknown.
        """
        if self._recorded is None:
            raise RuntimeError(
                "the tapped module gave no features since they were last read: it did not run in training "
                "mode, so there is nothing to distil. Does the student call its `backbone` as a module?"
            )
        recorded, times = self._recorded, self._times
        self.clear()
        if times > 1:
            raise RuntimeError(f"the tapped module ran {times} times in one step; only one run can be distilled")
        return recorded

    def clear(self) -> None:
        """Forget what a training forward that failed half-way may have left."""
        self._recorded, self._times = None, 0

    def remove(self) -> None:
        """Take the hook off the module."""
        self._handle.remove()


class MethodTap:
    """Reads what a method of a module is called with and returns, where no hook sees it; in training mode only.

    It takes the method's place on that module, so a deep copy of a model that owns both carries its own working pair.

    Args:
        module: has the method.
        name: the method's; ``"forward"`` for what the module itself is called with.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self._name = module, name
        method = getattr(module, name)
        if inspect.ismethod(method):  # pickle looks a bound one up by its name, and would find the tap
            method = partial(method.__func__, method.__self__)
        self._method = method
        self._last: tuple[tuple[Any, ...], Any] | None = None  # of several calls only one is kept
        self._times = 0
        setattr(module, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        result = self._method(*args, **kwargs)
        if self._module.training:
            self._last = args, result
            self._times += 1
        return result

    def pop(self) -> tuple[tuple[Any, ...], Any]:
        """Return ``(arguments, result)`` of the only call since this was last asked, and forget it.

        Raises:
            RuntimeError: there was none, or more than one.
        """
        last, times = self._last, self._times
        self.clear()
        if last is None or times != 1:
            raise RuntimeError(
                f"{type(self._module).__name__}.{self._name} ran {times} times in one training step, once is needed to "
                "distil what it predicts (key: DISTILL.TAPS)"
            )
        return last

    def last(self) -> tuple[tuple[Any, ...], Any]:
        """Return ``(arguments, result)`` of the last call, and forget it; for what every step calls.

        Raises:
            RuntimeError: there was none.
        """
        last = self._last
        self.clear()
        if last is None:
            raise RuntimeError(f"{type(self._module).__name__}.{self._name} did not run in training mode")
        return last

    def clear(self) -> None:
        """Forget what a training forward that failed half-way may have left."""
        self._last, self._times = None, 0
