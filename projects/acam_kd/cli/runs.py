"""The engine of a run's folder."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError

__all__ = ["detectron2", "is_detectron2"]

CONFIG = "student_config.yaml"
"""The file that a run of Detectron2's engine writes, and no other."""
FINAL = "model_final.pth"
"""The file that every trainer of Detectron2's writes."""
WARNINGS: dict[str, type[Warning]] = {r"`torch\.jit\.": FutureWarning, r"torch\.meshgrid: ": UserWarning}
"""The beginnings of warnings that nobody can do anything about."""


def is_detectron2(run: str) -> bool:
    """Return whether a folder is a run of Detectron2's engine.

    Raises:
        ConfigError: it is a run of a trainer that leaves no config of the student, as that of LazyConfigs.
    """
    folder = Path(run)
    if (folder / "student.json").is_file():
        return False
    found = (folder / CONFIG).is_file()
    if not found and (folder / FINAL).is_file():
        raise ConfigError(
            "run",
            f"{FINAL} without {CONFIG} in {folder.absolute()}",
            allowed="a run of train_net.py or of acam-kd train",
            hint="a run of a LazyConfig or of your own trainer cannot be read",
        )
    return found


def detectron2(module: str) -> Any:
    """Import a module of Detectron2's engine; torch's warnings about code of Detectron2's are not shown from then on.

    Raises:
        ConfigError: Detectron2 is not installed.
    """
    for text, kind in WARNINGS.items():
        warnings.filterwarnings("ignore", text, kind)
    try:
        return importlib.import_module(f"..d2.{module}", __package__)
    except ImportError as error:
        raise ConfigError(
            "run",
            f"a run of Detectron2's, which cannot be imported ({error})",
            allowed="Detectron2 to be installed",
            hint="see Set-up in README.md",
        ) from error
