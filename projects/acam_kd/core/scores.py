"""The teacher's scores: its own head's certainty of an object at every position of every level.

A method that has ``scores`` among its ``needs`` finds them in ``Targets.scores``. An engine's adapter gives the maps of
its heads; here they are brought to the levels of the backbone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from .distiller import Distiller
from .errors import ConfigError
from .features import CLASSES, Features
from .targets import Targets
from .teacher import Extract

if TYPE_CHECKING:
    from .adapter import Adapter

__all__ = ["SCORES", "ReadScores", "at_levels", "check_scores", "scored", "with_scores"]

SCORES = "scores"
"""The entry of ``Distiller.needs``, and the field of ``Targets``."""

ReadScores = Callable[[nn.Module, Features], Mapping[str, Tensor]]
"""A detector and the levels of its backbone -> level -> the largest probability of a class, (N, 1, H, W)."""


def check_scores(teacher: Adapter, method: Distiller) -> None:
    """Raise ConfigError for a method that needs the scores of a teacher without any."""
    for part in method.parts():
        if SCORES in part.needs and teacher.read_scores is None:
            raise ConfigError(
                "method", type(part).__name__, "one that needs no scores of the teacher",
                f"a {teacher.name} does not score positions, as RetinaNet, FCOS, SSD and R-CNNs do; choose CWD, Mimic "
                "or another {method}",
            )  # fmt: skip


def at_levels(scores: Mapping[str, Tensor], features: Features) -> dict[str, Tensor]:
    """Return scores for every level: the head's own, else those of the level that is nearest in size, resized.

    Args:
        scores: level -> (N, 1, H, W), of the levels that the head sees.
        features: level -> (N, C, H, W).

    Example:
        >>> import torch
        >>> maps = {"p2": torch.zeros(1, 8, 4, 4), "p3": torch.zeros(1, 8, 2, 2)}
        >>> found = at_levels({"p3": torch.full((1, 1, 2, 2), 0.5)}, maps)
        >>> {level: tuple(x.shape) for level, x in found.items()}
        {'p2': (1, 1, 4, 4), 'p3': (1, 1, 2, 2)}
    """
    found = {}
    for level, feature in features.items():
        own = scores.get(level)
        if own is None:
            own = min(scores.values(), key=lambda x: abs(x[0].numel() - feature[0, 0].numel()))
        if own.shape[2:] != feature.shape[2:]:
            own = F.interpolate(own, feature.shape[2:], mode="bilinear", align_corners=False)
        found[level] = own
    return found


@dataclass(frozen=True)
class _Scored:
    """An extraction that adds the scores of every level to the features.

    Args:
        extract: makes the features of the whole detector and a batch.
        read: see ``ReadScores``.
    """

    extract: Extract
    read: ReadScores

    def __call__(self, network: nn.Module, batch: Tensor, *regions: Any) -> Features:
        features = self.extract(network, batch, *regions)
        maps = {level: x for level, x in features.items() if level != CLASSES}
        scores = {level: x.float() for level, x in self.read(network, maps).items()}
        return {**features, **{_key(level): x for level, x in at_levels(scores, maps).items()}}


def _backbone(model: nn.Module, batch: Tensor) -> Features:
    return model.backbone(batch)  # type: ignore[operator,no-any-return]


def scored(teacher: Adapter, network: nn.Module, extract: Extract) -> tuple[nn.Module, Extract]:
    """Return the whole teacher, and an extraction that adds its scores; ``check_scores`` has found that it has some.

    Args:
        teacher: its adapter.
        network, extract: what ``Adapter.network`` returned, of the backbone alone or of the whole.
    """
    assert teacher.read_scores is not None
    return teacher.model, _Scored(extract if network is teacher.model else _backbone, teacher.read_scores)


def with_scores(targets: Targets, teacher: Features, levels: Mapping[str, str]) -> Targets:
    """Return targets with the scores among a teacher's features, under the student's level names.

    Args:
        targets: of the batch.
        teacher: its features, with scores if the method needs them.
        levels: student's level name -> teacher's level name.
    """
    found = {s: teacher[_key(t)] for s, t in levels.items() if _key(t) in teacher}
    return dataclasses.replace(targets, scores=found) if found else targets


def _key(level: str) -> str:
    return f"{level}/{SCORES}"
