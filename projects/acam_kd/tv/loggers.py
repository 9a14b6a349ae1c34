"""Lightning's loggers, which get the same numbers as TensorBoard's file."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError

__all__ = ["LOGGERS", "Loggers", "check_loggers"]


def _csv(folder: Path) -> Any:
    from lightning.pytorch.loggers import CSVLogger

    return CSVLogger(folder, name="csv")  # a resumed run gets a version of its own


def _mlflow(folder: Path) -> Any:
    from lightning.pytorch.loggers import MLFlowLogger

    return MLFlowLogger(experiment_name="acam-kd", run_name=folder.name)


def _wandb(folder: Path) -> Any:
    from lightning.pytorch.loggers import WandbLogger

    return WandbLogger(name=folder.name, project="acam-kd", save_dir=folder)


LOGGERS: dict[str, Callable[[Path], Any]] = {"csv": _csv, "mlflow": _mlflow, "wandb": _wandb}
"""The choices of ``--logger`` -> a function of the run's folder."""


def check_loggers(names: Sequence[str]) -> None:
    """Check that the packages of loggers are installed.

    Raises:
        ConfigError: one is not.
    """
    for name in names:
        if name != "csv" and importlib.util.find_spec(name) is None:
            raise ConfigError("logger", name, f"the package {name} to be installed", f"pip install {name}")


class Loggers:
    """The loggers of a run's first process.

    Args:
        names: keys of ``LOGGERS``.
        folder: of the run.
        settings: are sent to each logger as its hyper-parameters.
    """

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> None:
        self.loggers = [LOGGERS[name](folder) for name in names]
        for logger in self.loggers:
            logger.log_hyperparams(dict(settings))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log the values of a step."""
        for logger in self.loggers:
            logger.log_metrics(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        """Write what is not written yet."""
        for logger in self.loggers:
            logger.finalize("failed" if failed else "success")
