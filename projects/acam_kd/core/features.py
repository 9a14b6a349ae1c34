"""Feature pyramids: what they look like, and how two of them correspond.

Shapes: N images, C channels, H x W positions of one level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = [
    "BACKBONE",
    "CLASSES",
    "LOGITS",
    "TAPS",
    "FeatureSpec",
    "Features",
    "Pyramid",
    "match_levels",
]

Features = Mapping[str, Tensor]
"""Level name -> (N, C, H, W)."""


BACKBONE = "backbone"
"""The tap of a backbone's levels."""
LOGITS = "logits"
"""The tap, and the level, of a segmentation model's predicted map, before upsampling."""
CLASSES = "classes"
"""The tap, and the level, of what a detector's class head predicts, (N, K, A, 1): K classes for each of A anchors, or
(R, K, 1, 1) for each of R regions."""
TAPS = (BACKBONE, LOGITS, CLASSES)
"""Where a model can be tapped."""


@dataclass(frozen=True)
class FeatureSpec:
    """One level of a pyramid.

    Args:
        channels: C.
        stride: in input pixels; 0 for predictions that lie on no map: those of a class head.
        logits: the channels are classes.
        sigmoid: each of these classes is predicted on its own, and there is none for the background.
    """

    channels: int
    stride: int
    logits: bool = False
    sigmoid: bool = False

    @property
    def tap(self) -> str:
        """Which of ``TAPS`` gives it."""
        return (LOGITS if self.stride else CLASSES) if self.logits else BACKBONE


Pyramid = Mapping[str, FeatureSpec]
"""Level name -> its shape."""


def describe(pyramid: Pyramid) -> str:
    """One line for messages, as ``p3 (stride 8, 256 channels), ...``."""
    return ", ".join(f"{name} (stride {s.stride}, {s.channels} channels)" for name, s in pyramid.items())


def match_levels(student: Pyramid, teacher: Pyramid, levels: Sequence[str] = ()) -> dict[str, str]:
    """Pair the levels of two pyramids: by name where name and stride agree, else by stride; logits with logits.

    Args:
        student: the student's pyramid.
        teacher: the teacher's pyramid.
        levels: the student's levels that must be paired; empty for every one that has a partner. Logits always are.

    Returns:
        Student's level name -> teacher's level name, in the student's order.

    Raises:
        KeyError: a name in ``levels`` is not a level of the student.
        ValueError: which of several levels of one stride belong together is open, no strides are shared, a level
            asked for has no partner, or, where none was asked for, most have none; the message prints both
            pyramids. Or the numbers of classes of two logit maps differ.
    """
    both = f"student: {describe(student)}; teacher: {describe(teacher)}"
    unknown = [name for name in levels if name not in student]
    if unknown:
        raise KeyError(f"unknown level {unknown[0]!r}; the student has: {', '.join(student)} (key: DISTILL.LEVELS)")
    wanted = [name for name, spec in student.items() if not levels or name in levels or spec.logits]
    pairs: dict[str, str] = {}
    for name in wanted:
        partners = _partners(name, student[name], teacher)
        if len(partners) > 1:
            raise ValueError(
                f"two levels of the teacher have stride {student[name].stride}; leave that level out of "
                f"DISTILL.LEVELS. {both}"
            )
        pairs.update((name, partner) for partner in partners)
    if len(set(pairs.values())) < len(pairs):
        raise ValueError(f"two levels of the student have the same stride; choose with DISTILL.LEVELS. {both}")
    if not pairs:
        raise ValueError(f"student and teacher share no stride, so there is nothing to distil. {both}")
    if not levels and 2 * len(pairs) < len(wanted):
        raise ValueError(f"most levels of the student have no partner; name those to distil in DISTILL.LEVELS. {both}")
    if levels and len(pairs) < len(wanted):
        alone = [name for name in wanted if name not in pairs]
        raise ValueError(f"the teacher has no level for {', '.join(alone)} (key: DISTILL.LEVELS). {both}")
    for name, partner in pairs.items():
        own, other = student[name], teacher[partner]
        if own.sigmoid != other.sigmoid:
            raise ValueError(
                f"one class head predicts each class on its own, the other one of all, the student's: {own}, the "
                f"teacher's: {other}; distil backbone features instead (keys: DISTILL.TAPS, DISTILL.METHOD)"
            )
        if own.logits and own.channels != other.channels:
            raise ValueError(
                f"the student predicts {own.channels} classes, the teacher {other.channels}, so their logits do "
                "not correspond; distil backbone features instead (key: DISTILL.TAPS)"
            )
    return pairs


def _partners(name: str, spec: FeatureSpec, teacher: Pyramid) -> list[str]:
    """The teacher's levels that this one may be paired with."""
    if spec.logits:
        return [level for level, other in teacher.items() if other.tap == spec.tap]
    same = {level: other for level, other in teacher.items() if other.stride == spec.stride and not other.logits}
    return [name] if name in same else list(same)
