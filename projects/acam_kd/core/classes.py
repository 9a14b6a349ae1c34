"""Common classes: which predictions of a student and of a teacher mean the same class, by name.

The logits of both are reduced to the common classes, in the student's order, before a method sees them. So no method
knows of it.

* Classes under a softmax: the method's own softmax runs over the logits that are left. It gives the distribution under
  the condition that one of these classes, or the background, is present: p(k) / sum of p over the common classes.
* A sigmoid for each class: each stands alone, so its probability does not change.
* The background of a class head is common to both and keeps its place.
* A label that is no common class becomes ``IGNORED``, for methods that read labels.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checks import check_channels
from .class_names import BACKGROUND, UNUSED, channel_names
from .errors import ConfigError
from .features import FeatureSpec, Pyramid
from .targets import IGNORED

if TYPE_CHECKING:
    from .adapter import Adapter

__all__ = ["CommonClasses", "common_classes", "foreign_class_layers"]

LISTED = 100
"""The largest number of names in a message."""


@dataclass(frozen=True)
class CommonClasses:
    """The channels of two maps of logits that predict the same classes.

    Args:
        student, teacher: the channels of each, pair by pair, in the student's order.
        channels: the numbers of all channels of the two.

    Example:
        >>> common = CommonClasses(student=(0, 2), teacher=(5, 1), channels=(3, 6))
        >>> common.of_teacher(torch.arange(6.0).view(1, 6)).tolist()
        [[5.0, 1.0]]
        >>> common.labels(torch.tensor([0, 1, 2, 3, -1])).tolist()  # 3 is the background of a sigmoid head
        [0, -1, 1, 2, -1]
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    channels: tuple[int, int]

    def of_student(self, logits: Tensor, level: str = "logits") -> Tensor:
        """Select the student's logits: (N, K, ...) -> (N, number of common channels, ...)."""
        check_channels("student", level, logits, self.channels[0])
        return _selected(logits, self.student)

    def of_teacher(self, logits: Tensor, level: str = "logits") -> Tensor:
        """Select the teacher's logits, in the student's order."""
        check_channels("teacher", level, logits, self.channels[1])
        return _selected(logits, self.teacher)

    def labels(self, labels: Tensor) -> Tensor:
        """Renumber labels of the student's classes; those of no common class become ``IGNORED``.

        Args:
            labels: int64 of any shape. The student's number of channels is the background of predictions that have no
                channel for it, and becomes the number of common channels.
        """
        numbers = [IGNORED] * self.channels[0] + [len(self.student)]
        for number, channel in enumerate(self.student):
            numbers[channel] = number
        table = _on_device(tuple(numbers), labels.device)
        return table[labels.long().clamp(0, self.channels[0])].masked_fill(labels < 0, IGNORED)


def _selected(logits: Tensor, channels: tuple[int, ...]) -> Tensor:
    if channels == tuple(range(logits.shape[1])):
        return logits
    return logits.index_select(1, _on_device(channels, logits.device))


@lru_cache
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the numbers as a tensor; one that is made anew in each step would wait for the device."""
    with torch.inference_mode(False):  # it is kept, and may be needed with gradients later
        return torch.tensor(numbers, device=device)


def common_classes(
    student: Adapter,
    teacher: Adapter,
    shapes: Mapping[str, Pyramid],
    class_map: Mapping[str, str],
    logger: logging.Logger,
) -> tuple[dict[str, Pyramid], dict[str, CommonClasses]]:
    """Find the common classes of all predictions that two models share.

    Args:
        student, teacher: the models, whose ``class_names`` count.
        shapes: ``"student"`` and ``"teacher"`` -> level -> its shape.
        class_map: student's name of a class -> the teacher's, where they differ.
        logger: told about the match.

    Returns:
        The shapes, those of predictions reduced to the common classes; and the student's level -> its common classes.
        Levels are left out where the two have the same classes in the same order, or where the names are unknown and
        the numbers equal.

    Raises:
        ConfigError: the two have no class in common; or other numbers of classes, and the names of one are unknown; or
            names or ``class_map`` do not fit.
    """
    reduced = {role: dict(pyramid) for role, pyramid in shapes.items()}
    common: dict[str, CommonClasses] = {}
    levels = list(_predictions(shapes["student"], shapes["teacher"]))
    for level, partner in levels:
        specs = shapes["student"][level], shapes["teacher"][partner]
        names = channel_names(student, specs[0], "student"), channel_names(teacher, specs[1], "teacher")
        if not _named(names, specs, partner, class_map):
            continue
        same = list(_translated(names[0], class_map)) == list(names[1])
        if same and not class_map:
            continue
        pairs = _pairs(*names, class_map)  # checks the mapping too
        if same:
            continue
        _report(*names, pairs, logger)
        found = CommonClasses(*zip(*pairs), channels=(specs[0].channels, specs[1].channels))  # type: ignore[misc]
        common[level] = found
        for role, name, spec in (("student", level, specs[0]), ("teacher", partner, specs[1])):
            unused = min(spec.unused, sum(names[0][own] == BACKGROUND for own, _ in pairs))
            reduced[role][name] = dataclasses.replace(spec, channels=len(pairs), unused=unused)
    if class_map and not levels:
        logger.warning("the mapping of class names is not used: no predictions are distilled")
    return {**reduced}, common


def _predictions(student: Pyramid, teacher: Pyramid) -> Iterator[tuple[str, str]]:
    """Yield the levels of predictions of one kind that belong together."""
    for level, spec in student.items():
        for partner, other in teacher.items():
            if spec.logits and (spec.tap, spec.sigmoid) == (other.tap, other.sigmoid):
                yield level, partner


def _named(
    names: tuple[Sequence[str], Sequence[str]],
    specs: tuple[FeatureSpec, FeatureSpec],
    partner: str,
    class_map: Mapping[str, str],
) -> bool:
    """Say whether both names are known, and raise if they are needed and are not."""
    unknown = [f"{{{role}_class_names}}" for role, known in zip(("student", "teacher"), names) if not known]
    if unknown and class_map:
        raise ConfigError(
            "class_map", _mapped(class_map), "names of classes that are known", f"give {' and '.join(unknown)} too"
        )
    if unknown and specs[0].channels != specs[1].channels:
        raise ConfigError(
            "teacher", f"{specs[1].channels} classes at {partner}", f"the student's {specs[0].channels}",
            f"name the classes by {' and '.join(unknown)}, and the common ones are compared; or distil the features of "
            "the backbones, by {taps} or another {method}",
        )  # fmt: skip
    return not unknown


def _pairs(student: Sequence[str], teacher: Sequence[str], class_map: Mapping[str, str]) -> list[tuple[int, int]]:
    """Pair the channels of one name: (student's, teacher's), in the student's order.

    Raises:
        ConfigError: there are none, or a name stands for several classes, or ``class_map`` has a name that is unknown.
    """
    for name, other in class_map.items():
        for role, word, names in (("student", name, student), ("teacher", other, teacher)):
            if word not in names:
                raise ConfigError("class_map", f"{name}={other}", f"a class of the {role}: {_listed(names)}")
    pairs = []
    wanted = _translated(student, class_map)
    for channel, name in enumerate(wanted):
        if student[channel] == UNUSED or name not in teacher:
            continue
        if wanted.count(name) > 1:
            several = [own for own, other in zip(student, wanted) if other == name]
            raise ConfigError(
                "class_map", f"{', '.join(several)} for the teacher's {name}", "one class of the student for each",
                "change {class_map}, or the names",
            )  # fmt: skip
        if teacher.count(name) > 1:
            raise ConfigError("teacher_class_names", f"{teacher.count(name)} classes called {name}", "different names")
        pairs.append((channel, teacher.index(name)))
    if not any(wanted[channel] != BACKGROUND for channel, _ in pairs):
        raise ConfigError(
            "teacher", f"the classes {_listed(teacher)}", f"some of the student's {_listed(student)}",
            "say which correspond by {class_map}, as NAME=NAME; or distil the features of the backbones, by {taps} or "
            "another {method}",
        )  # fmt: skip
    return pairs


def _translated(names: Sequence[str], class_map: Mapping[str, str]) -> list[str]:
    return [class_map.get(name, name) for name in names]


def _classes(names: Sequence[str]) -> list[str]:
    """Return the names that are classes."""
    return [name for name in names if name not in (BACKGROUND, UNUSED)]


def _listed(names: Sequence[str]) -> str:
    classes = _classes(names)
    more = f", and {len(classes) - LISTED} more" if len(classes) > LISTED else ""
    return ", ".join(classes[:LISTED]) + more


def _mapped(class_map: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={other}" for name, other in class_map.items())


def _report(
    student: Sequence[str], teacher: Sequence[str], pairs: Sequence[tuple[int, int]], logger: logging.Logger
) -> None:
    """Log which classes are compared, as a warning if the student has others."""
    matched = {student[s]: teacher[t] for s, t in pairs if teacher[t] != BACKGROUND}
    shown = [name if name == other else f"{name} ({other})" for name, other in matched.items()]
    kept = {s for s, _ in pairs}
    alone = [name for channel, name in enumerate(student) if name != UNUSED and channel not in kept]
    left_out = f"; left out, as the teacher does not know them: {', '.join(alone)}" if alone else ""
    logger.log(
        logging.WARNING if alone else logging.INFO,
        "classes: %d of the student's %d are among the teacher's %d: %s%s",
        len(matched), len(_classes(student)), len(_classes(teacher)), ", ".join(shown), left_out,
    )  # fmt: skip


def foreign_class_layers(
    student: Adapter, teacher: Adapter, class_map: Mapping[str, str], logger: logging.Logger
) -> list[str]:
    """Return the prefixes of the student's class layers if the teacher's are known to be of other classes.

    Such layers must not be inherited. Their shapes agree wherever the numbers of classes do.
    """
    own, other = ([name for name in model.class_names if name != BACKGROUND] for model in (student, teacher))
    if not own or not other or _translated(own, class_map) == other:
        return []
    logger.info("class layers are not inherited: the teacher knows other classes, or has them in another order")
    return list(student.class_layers)
