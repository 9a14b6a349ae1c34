"""Feature pyramids: their shapes, and how the levels of two of them correspond.

Shapes: N images, C channels, H x W positions of one level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .errors import ConfigError

__all__ = [
    "BACKBONE",
    "CLASSES",
    "LOGITS",
    "NECK_CONVS",
    "TAPS",
    "Channels",
    "FeatureSpec",
    "Features",
    "Pyramid",
    "as_pyramid",
    "match_levels",
]

Features = Mapping[str, Tensor]
"""Level name -> (N, C, H, W)."""


BACKBONE = "backbone"
"""The tap of a backbone's levels."""
LOGITS = "logits"
"""The tap, and the level, of a segmentation model's predicted map, before upsampling."""
CLASSES = "classes"
"""The tap, and the level, of the predicted classes, (N, K, A, 1): K classes for each of A anchors, or (R, K, 1, 1) for
each of R regions, or images."""
NECK_CONVS = "neck_convs"
"""The tap of a neck's levels before they are normalised; used only where it is asked for, by a user or a recipe."""
TAPS = (BACKBONE, LOGITS, CLASSES, NECK_CONVS)
"""The places where a model can be tapped."""


@dataclass(frozen=True)
class FeatureSpec:
    """One level of a pyramid.

    Args:
        channels: C.
        stride: in input pixels; 0 where it is not known, and for the predictions of a class head, which lie on no map.
        logits: the channels are classes.
        sigmoid: each of these classes is predicted on its own, and there is none for the background.
        before_norm: it is a neck's level before its normalisation.
        unused: the number of channels that predict no class, as the background of torchvision's dense heads.
    """

    channels: int
    stride: int
    logits: bool = False
    sigmoid: bool = False
    before_norm: bool = field(default=False, repr=False)
    unused: int = field(default=0, repr=False)

    @property
    def tap(self) -> str:
        """The one of ``TAPS`` that gives it."""
        if self.logits:
            return LOGITS if self.stride else CLASSES
        return NECK_CONVS if self.before_norm else BACKBONE


Pyramid = Mapping[str, FeatureSpec]
"""Level name -> its shape."""
Channels = Mapping[str, "int | FeatureSpec"]
"""Level name -> its channels, or its whole shape."""


def as_pyramid(levels: Channels) -> dict[str, FeatureSpec]:
    """Return the shapes of levels that may be given by their channels alone.

    Levels named ``logits`` or ``classes`` are predictions by one softmax; a ``FeatureSpec`` says anything else.

    Example:
        >>> as_pyramid({"p3": 256})["p3"]
        FeatureSpec(channels=256, stride=0, logits=False, sigmoid=False)
        >>> as_pyramid({"classes": 80})["classes"].tap
        'classes'
    """
    strides = {LOGITS: 1}  # a map has one; its value does not matter to a method
    return {
        name: spec
        if isinstance(spec, FeatureSpec)
        else FeatureSpec(spec, strides.get(name, 0), name in (LOGITS, CLASSES))
        for name, spec in levels.items()
    }


def describe(pyramid: Pyramid) -> str:
    """Return one line for messages, as ``p3 (stride 8, 256 channels), ...``."""
    return ", ".join(f"{name} (stride {s.stride}, {s.channels} channels)" for name, s in pyramid.items())


def near(student: FeatureSpec, teacher: FeatureSpec) -> bool:
    """Say whether two maps have strides that differ by less than a factor of 2, so that one can be resized.

    Example:
        >>> near(FeatureSpec(256, 16), FeatureSpec(384, 14)), near(FeatureSpec(256, 16), FeatureSpec(384, 8))
        (True, False)
    """
    low, high = sorted((student.stride, teacher.stride))
    return not (student.logits or teacher.logits) and 0 < low < high < 2 * low


def match_levels(student: Pyramid, teacher: Pyramid, levels: Sequence[str] = ()) -> dict[str, str]:
    """Pair the levels of two pyramids: by name where name and stride agree, else by stride; logits with logits.

    Where no stride agrees, a level of the same name and a near stride is the partner; see ``near``.

    Args:
        student: the student's pyramid.
        teacher: the teacher's pyramid.
        levels: the student's levels that must be paired; empty for every one that has a partner. Logits always are.

    Returns:
        Student's level name -> teacher's level name, in the student's order.

    Raises:
        ConfigError: ``levels`` names no level of the student; or several levels of one stride could belong together; or
            no strides are shared; or a level asked for has no partner; or, where none was asked for, most have none.
            The message prints both pyramids. Or two logit maps predict other numbers of classes.

    Example:
        >>> student = {"p3": FeatureSpec(64, 8), "p4": FeatureSpec(64, 16)}
        >>> teacher = {"res3": FeatureSpec(512, 8), "res4": FeatureSpec(1024, 16), "res5": FeatureSpec(2048, 32)}
        >>> match_levels(student, teacher)
        {'p3': 'res3', 'p4': 'res4'}
    """
    both = f"student: {describe(student)}; teacher: {describe(teacher)}"
    unknown = [name for name in levels if name not in student]
    if unknown:
        raise ConfigError("levels", unknown[0], f"levels of the student: {', '.join(student)}")
    wanted = [name for name, spec in student.items() if not levels or name in levels or spec.logits]
    pairs: dict[str, str] = {}
    for name in wanted:
        partners = _partners(name, student[name], teacher)
        if len(partners) > 1:
            stride = student[name].stride
            raise ConfigError(
                "levels",
                f"{len(partners)} levels of the teacher for {name} (stride {stride})",
                "one",
                f"leave it out. {both}",
            )
        pairs.update((name, partner) for partner in partners)
    if len(set(pairs.values())) < len(pairs):
        raise ConfigError("levels", "several levels of the student with one stride", "one", f"name one of them. {both}")
    if not pairs:
        raise ConfigError("teacher", "no stride that the student has too", "levels of the same strides", both)
    if not levels and 2 * len(pairs) < len(wanted):
        raise ConfigError(
            "levels",
            f"a partner for {len(pairs)} of {len(wanted)} levels",
            "for most of them",
            f"name those to distil. {both}",
        )
    if levels and len(pairs) < len(wanted):
        alone = ", ".join(name for name in wanted if name not in pairs)
        raise ConfigError("levels", alone, "levels whose stride the teacher has too", both)
    for name, partner in pairs.items():
        _check_predictions(name, student[name], teacher[partner])
    return pairs


def _check_predictions(level: str, student: FeatureSpec, teacher: FeatureSpec) -> None:
    """Raise ConfigError for predictions of two models that do not correspond."""
    hint = "distil the features of the backbones instead, by {taps} or another {method}"
    if student.sigmoid != teacher.sigmoid:
        kinds = [
            f"{'a sigmoid for each class' if s.sigmoid else 'one softmax'} ({s.channels})" for s in (student, teacher)
        ]
        raise ConfigError("teacher", f"at {level} {kinds[1]} beside the student's {kinds[0]}", "one kind", hint)
    if student.logits and student.channels != teacher.channels:
        raise ConfigError(
            "teacher", f"{teacher.channels} classes at {level}", f"the student's {student.channels}", hint
        )


def _partners(name: str, spec: FeatureSpec, teacher: Pyramid) -> list[str]:
    """List the teacher's levels that a level may be paired with."""
    if spec.logits:
        return [level for level, other in teacher.items() if other.tap == spec.tap]
    same = {level: other for level, other in teacher.items() if other.stride == spec.stride and not other.logits}
    if not same and name in teacher and near(spec, teacher[name]):
        return [name]
    return [name] if name in same else list(same)
