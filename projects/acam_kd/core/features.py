"""Feature pyramids: what they look like, how two of them correspond, how they are intercepted.

Shapes: N images, C channels, H x W positions of one level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["FeatureSpec", "FeatureTap", "Features", "Pyramid", "match_levels"]

Features = Mapping[str, Tensor]
"""Level name -> (N, C, H, W)."""


@dataclass(frozen=True)
class FeatureSpec:
    """One level of a pyramid: its channels, and its stride in input pixels."""

    channels: int
    stride: int


Pyramid = Mapping[str, FeatureSpec]
"""Level name -> its shape."""


def describe(pyramid: Pyramid) -> str:
    """One line for messages, as ``p3 (stride 8, 256 channels), ...``."""
    return ", ".join(f"{name} (stride {s.stride}, {s.channels} channels)" for name, s in pyramid.items())


def match_levels(student: Pyramid, teacher: Pyramid, levels: Sequence[str] = ()) -> dict[str, str]:
    """Pair the levels of two pyramids by stride.

    Args:
        student: the student's pyramid.
        teacher: the teacher's pyramid.
        levels: the student's levels that must be paired; empty for every one that has a partner.

    Returns:
        Student's level name -> teacher's level name, in the student's order.

    Raises:
        KeyError: a name in ``levels`` is not a level of the student.
        ValueError: two levels of one pyramid share a stride, no strides are shared, a level asked for has
            no partner, or, where none was asked for, most have none. The message prints both pyramids.
    """
    both = f"student: {describe(student)}; teacher: {describe(teacher)}"
    unknown = [name for name in levels if name not in student]
    if unknown:
        raise KeyError(f"unknown level {unknown[0]!r}; the student has: {', '.join(student)} (key: DISTILL.LEVELS)")
    wanted = [name for name in student if not levels or name in levels]
    strides = [student[name].stride for name in wanted]
    if len(set(strides)) < len(strides):
        raise ValueError(f"two levels of the student have the same stride; choose with DISTILL.LEVELS. {both}")
    by_stride: dict[int, str] = {}
    for name, spec in teacher.items():
        if spec.stride in by_stride and spec.stride in strides:
            raise ValueError(
                f"two levels of the teacher have stride {spec.stride}; leave that level out of DISTILL.LEVELS. {both}"
            )
        by_stride[spec.stride] = name
    pairs = {name: by_stride[student[name].stride] for name in wanted if student[name].stride in by_stride}
    if not pairs:
        raise ValueError(f"student and teacher share no stride, so there is nothing to distil. {both}")
    if not levels and 2 * len(pairs) < len(wanted):
        raise ValueError(f"most levels of the student have no partner; name those to distil in DISTILL.LEVELS. {both}")
    if levels and len(pairs) < len(wanted):
        alone = [name for name in wanted if name not in pairs]
        raise ValueError(f"the teacher has no level for {', '.join(alone)} (key: DISTILL.LEVELS). {both}")
    return pairs


class FeatureTap:
    """Reads what goes into and comes out of a module, without subclassing it.

    Recording happens in training mode only. The hook is a bound method, so a deep copy of a model that
    owns both the tap and the module carries its own working pair.

    Args:
        module: returns a mapping from level name to (N, C, H, W), as the backbones of Detectron2 and
            torchvision do.
    """

    def __init__(self, module: nn.Module) -> None:
        self._recorded: tuple[Tensor, Features] | None = None
        self._times = 0
        self._handle = module.register_forward_hook(self._record)

    def _record(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not module.training:
            return
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
