"""The card of a run's student, which lies beside its weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import ConfigError, RunError, first_line
from ..json_file import read_json
from .timm_trunk import is_timm

if TYPE_CHECKING:
    from .data import Images
    from .run import Settings

__all__ = ["Card", "read_card", "resolved"]


@dataclass(frozen=True)
class Card:
    """The facts needed to load a student; they lie beside ``student.pth`` as ``student.json``."""

    name: str
    num_classes: int
    size: int | None
    categories: dict[int, str] = field(default_factory=dict)
    """Label -> name."""
    pixel_mean: tuple[float, ...] = ()
    pixel_std: tuple[float, ...] = ()
    """The statistics of its pixels in [0, 1], RGB; empty for torchvision's own."""

    @classmethod
    def of(cls, settings: Settings, data: Images, student: Any) -> Card:
        """Make the card of a run's student.

        Args:
            settings: of the run.
            data: that it is trained on.
            student: the model. The statistics of a trunk of timm's are kept, as timm may change what it says of them.
        """
        timm = is_timm(settings.student_name)
        return cls(
            settings.student_name,
            data.num_classes,
            settings.size,
            data.categories,
            tuple(student.transform.image_mean) if timm else settings.pixel_mean,
            tuple(student.transform.image_std) if timm else settings.pixel_std,
        )


def read_card(folder: str | Path, *, argument: str = "folder") -> tuple[Card, Path]:
    """Find the card and the weights in the folder of a finished run.

    Args:
        folder: the folder of the run.
        argument: the name of the argument that the folder was given as, for messages.

    Raises:
        ConfigError: there is no finished run.
        RunError: the card is damaged.
    """
    path = Path(folder) / "student.json"
    if not path.is_file() or not path.with_suffix(".pth").is_file():
        raise ConfigError(
            argument,
            f"no finished run in {Path(folder).absolute()}",
            allowed="a folder with student.json and student.pth",
        )
    content = read_json(path, ("name", "num_classes", "size"))
    try:
        content["categories"] = {int(label): str(name) for label, name in content["categories"].items()}
        content |= {name: tuple(map(float, content.get(name, ()))) for name in ("pixel_mean", "pixel_std")}
        card = Card(**content)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise RunError(f"it is no card of a student ({first_line(error)})", str(path), "restore it") from error
    if not isinstance(card.name, str) or type(card.num_classes) is not int or card.num_classes < 1:
        raise RunError("it is no card of a student", str(path), "restore it")
    return card, path.with_suffix(".pth")


def resolved(settings: Settings) -> Settings:
    """Return settings with size and pixel statistics of a folder's student, where no others were asked for."""
    if not Path(settings.student).is_dir():
        return settings
    card = read_card(settings.student, argument="student")[0]
    return dataclasses.replace(
        settings,
        size=card.size if settings.size is None else settings.size,
        pixel_mean=settings.pixel_mean or card.pixel_mean,
        pixel_std=settings.pixel_std or card.pixel_std,
    )
