"""Taps: what goes into and comes out of a part of the student, recorded while the student makes a distilled step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError

__all__ = ["Call", "EntryTap", "MethodTap", "ModuleTap", "Tap", "leave_to_python", "restore_autocast"]


def leave_to_python(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a hook out of graphs that ``torch.compile`` makes of a student: it records tensors in Python objects."""
    return torch._disable_dynamo(function)  # type: ignore[attr-defined]  # as torch.compiler.disable, without importing dynamo


@dataclass
class Call:
    """One call of a tapped part.

    Args:
        args, kwargs: what it was called with.
        output: what it returned.
        autocast: device type, data type and whether autocast was on inside of it.
        grad: whether gradients were recorded inside of it.
        versions: of the tensors in the output: each operation in place counts one up.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    autocast: tuple[str, torch.dtype, bool]
    grad: bool
    versions: tuple[int, ...] = ()

    @property
    def changed(self) -> bool:
        """The output was changed in place afterwards."""
        return self.versions != _versions(self.output)

    @property
    def first(self) -> Any:
        """The first argument, by position or by name."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)


class Tap:
    """Records the only call of a part during a step; it follows no module's mode, only ``arm``.

    Args:
        name: the part's, for messages.
        role: whose part it is, for messages.
    """

    def __init__(self, name: str, role: str = "student") -> None:
        self.name, self.role = name, role
        self.armed = False
        self._last: Call | None = None
        self._times = 0

    def arm(self) -> None:
        """Forget the last step and begin to record."""
        self.armed, self._last, self._times = True, None, 0

    def disarm(self) -> None:
        """Stop recording, and forget what a step that failed may have left."""
        self.armed, self._last, self._times = False, None, 0

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keep a call; of several only the last."""
        device = next((x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), "cpu")
        device = device if torch.amp.is_autocast_available(device) else "cpu"
        autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        versions = _versions(output)
        self._last = Call(args, kwargs, output, autocast, torch.is_grad_enabled(), versions)
        self._times += 1

    @property
    def times(self) -> int:
        """Calls since the tap was armed."""
        return self._times

    @property
    def stays(self) -> bool:
        """The part ran since the tap was armed, and nothing changed its output in place afterwards."""
        return self._last is not None and not self._last.changed

    def read(self, *, last: bool = False) -> Call:
        """Return the call of this step.

        Args:
            last: of several calls, return the last.

        Raises:
            ConfigError: there was none, or more than one.
        """
        if self._last is None or (self._times != 1 and not last):
            raise ConfigError(
                self.role,
                f"{self._times} calls of {self.name} in one training step",
                "one call",
                "its output is distilled, so the student has to call it as a module, once"
                + ("" if self._times else f"; a {self.name} that was replaced after attaching is not seen"),
            )
        if self._last.changed:
            raise ConfigError(
                self.role, f"an output of {self.name} that was changed in place afterwards", "one that stays",
                "tap the part that changes it, as an activation with inplace=True, or set inplace=False there",
            )  # fmt: skip
        return self._last

    def remove(self) -> None:
        """Take the tap off."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """Leave tensors of a step out of copies and pickles."""
        return {**self.__dict__, "armed": False, "_last": None, "_times": 0}


class ModuleTap(Tap):
    """A tap on a module, by a forward hook.

    Args:
        module: the part.
        name, role: see ``Tap``.
    """

    def __init__(self, module: nn.Module, name: str, role: str = "student") -> None:
        super().__init__(name, role)
        self._handle = module.register_forward_hook(self._hook, with_kwargs=True)

    @leave_to_python
    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.armed:
            self.record(args, kwargs, output)

    def remove(self) -> None:
        """Take the hook off the module."""
        self._handle.remove()


class EntryTap(ModuleTap):
    """A tap on what a module is called with: its output may be changed in place afterwards."""

    @leave_to_python
    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.armed:
            self.record(args, kwargs, None)


class MethodTap(Tap):
    """A tap on a method of one module, for what no hook sees.

    It takes the method's place in the instance's ``__dict__``; ``remove`` restores the ``__dict__`` exactly.

    Args:
        module: has the method.
        method: its name.
    """

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__(f"{type(module).__name__}.{method}")
        self._module, self._attribute = module, method
        self._replaced = module.__dict__.get(method)
        original = getattr(module, method)
        if inspect.ismethod(original):  # pickle looks a bound one up by its name, and would find the tap
            original = partial(original.__func__, original.__self__)
        self._original = original
        module.__dict__[method] = self

    @leave_to_python
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        output = self._original(*args, **kwargs)
        if self.armed:
            self.record(args, kwargs, output)
        return output

    def remove(self) -> None:
        """Put the method back."""
        if self._module.__dict__.get(self._attribute) is self:
            del self._module.__dict__[self._attribute]
            if self._replaced is not None:
                self._module.__dict__[self._attribute] = self._replaced


def restore_autocast(call: Call) -> torch.autocast:
    """Return a context with autocast as it was inside of a tapped part, which a decorated ``forward`` may have set."""
    device, dtype, enabled = call.autocast
    return torch.autocast(device, dtype=dtype, enabled=enabled)


def _versions(output: Any) -> tuple[int, ...]:
    values = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else [output]
    )
    return tuple(x._version for x in values if isinstance(x, Tensor) and not x.is_inference())
