"""The devices and processes of a run: Lightning's Fabric, as a run's settings ask for it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException

from ..core.errors import ConfigError, first_line
from .run import Settings

__all__ = ["build_fabric", "is_first", "launch"]


def build_fabric(settings: Settings) -> Fabric:
    """Build Fabric; it starts no process and touches no device yet.

    Under torchrun ``auto`` devices are torchrun's processes on this machine.

    Raises:
        ConfigError: Lightning cannot run that here.
    """
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    devices = settings.devices
    if devices == "auto" and TorchElasticEnvironment.detect():
        devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with _explained(MisconfigurationException, ImportError, ValueError, RuntimeError):
        fabric = Fabric(
            accelerator=settings.accelerator,
            devices=devices,
            num_nodes=settings.num_nodes,
            precision=settings.precision,  # type: ignore[arg-type]
        )
    # In mixed precision Fabric would round its inputs too: a box at 1001 pixels would begin at 1000. Autocast suffices.
    fabric.strategy.precision.convert_input = lambda data: data  # type: ignore[method-assign]
    return fabric


def is_first(fabric: Fabric) -> bool:
    """Say whether this is the first of all processes, also before the others are started."""
    return fabric.node_rank == 0 and fabric.local_rank == 0


def launch(fabric: Fabric) -> None:
    """Start the other processes, or meet those that torchrun or SLURM has started.

    Raises:
        ConfigError: there are other processes than the settings ask for.
    """
    with _explained(ValueError):
        fabric.launch()


@contextmanager
def _explained(*kinds: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kinds as error:
        raise ConfigError(
            "accelerator", first_line(error), "what Lightning takes",
            "see {accelerator}, {devices}, {num_nodes}, {precision}",
        ) from error  # fmt: skip
