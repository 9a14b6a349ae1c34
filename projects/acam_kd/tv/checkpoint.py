"""The checkpoint of a run: everything that a resumed run needs to be the same run.

The entries have the names that Lightning's Trainer gives them, which trained the models of version 0.1.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.precision import Precision
from torch import nn

from ..core import Distillation, RunError
from ..core.average import Average
from ..core.errors import first_line
from ..core.form import odd_optimizer, odd_part
from .hard import HardAugmentor

__all__ = ["Parts", "read_checkpoint", "restore_random"]

NEEDED = ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "rng", "seconds")
PREFIX = "model."
ANEW = "delete it, and {resume} starts anew"


@dataclass(frozen=True)
class Parts:
    """The parts of a run whose state changes.

    Args:
        model: the student.
        attached: its distillation.
        optimizer: of both.
        schedule: of the learning rate.
        precision: Fabric's; float16 has a loss scale.
        average: of the student's weights; perhaps an empty one.
        augmentor: what has been learnt to make images harder.
    """

    model: nn.Module
    attached: Distillation | None
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    precision: Precision
    average: Average
    augmentor: HardAugmentor | None = None

    def state(self, *, step: int, seconds: float) -> dict[str, Any]:
        """Collect the state after a step, with that of the random numbers."""
        state = {
            "global_step": step,
            "seconds": seconds,
            "state_dict": {f"{PREFIX}{name}": value for name, value in self.model.state_dict().items()},
            "optimizer_states": [self.optimizer.state_dict()],
            "lr_schedulers": [self.schedule.state_dict()],
            "MixedPrecision": self.precision.state_dict(),
            "rng": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["rng_cuda"] = torch.cuda.get_rng_state()
        if self.attached is not None:
            state["distiller"] = self.attached.state_dict()
        if average := self.average.state_dict():
            state["average"] = average
        if self.augmentor is not None:
            state["augmentor"] = self.augmentor.state_dict()
        return state

    def load(self, state: Mapping[str, Any], path: Path) -> None:
        """Take over a state that was read from a file; random numbers are left for ``restore_random``.

        Raises:
            RunError: it is the state of another student or of another method.
        """
        if self.attached is None and state.get("distiller"):
            raise RunError(
                "the checkpoint has a method's parameters, and this run has no method", "resuming",
                "resume with the same {method}, or start a new run from the student's weights",
            )  # fmt: skip
        try:
            if self.attached is not None:
                self.attached.load_state_dict(state.get("distiller", {}))
        except RunError:
            raise
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise RunError(f"its method's state cannot be read ({first_line(error)[:120]})", str(path), ANEW) from error
        if odd := self._odd(state):
            raise RunError(f"it is the checkpoint of another student (see {odd})", str(path), ANEW)
        tensors = {name.removeprefix(PREFIX): value for name, value in state["state_dict"].items()}
        try:
            self.model.load_state_dict(tensors)
            self.optimizer.load_state_dict(state["optimizer_states"][0])
            self.schedule.load_state_dict(state["lr_schedulers"][0])
            self.average.load_state_dict(state.get("average", {}))
            if self.augmentor is not None:
                self.augmentor.load_state_dict(state["augmentor"])
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RunError(f"it is the checkpoint of another student ({reason})", str(path), ANEW) from error
        if state.get("MixedPrecision"):
            self.precision.load_state_dict(state["MixedPrecision"])

    def _odd(self, state: Mapping[str, Any]) -> str:
        """Return the name of a part that is of another kind than this run's; empty if there is none."""
        own = self.state(step=0, seconds=0.0)
        optimizers, own_optimizers = state["optimizer_states"], own.pop("optimizer_states")
        for part in ("state_dict", "distiller"):  # which say themselves what does not fit
            own.pop(part, None)
        step, seconds = state["global_step"], state["seconds"]
        if type(step) is not int or step < 0 or not isinstance(seconds, (int, float)) or not math.isfinite(seconds):
            return "global_step and seconds"
        if not isinstance(optimizers, list) or len(optimizers) != 1:
            return "optimizer_states"
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return odd_part(state, own, "checkpoint") or odd_optimizer(optimizers[0], own_optimizers[0], parameters)


def restore_random(state: Mapping[str, Any]) -> None:
    """Continue the random numbers of a checkpoint."""
    torch.set_rng_state(state["rng"])
    if torch.cuda.is_available() and state.get("rng_cuda") is not None:
        torch.cuda.set_rng_state(state["rng_cuda"])


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, also one of version 0.1; no code in it is run.

    Raises:
        RunError: the file is broken, or is no checkpoint of ``acam-kd``.
    """
    if not zipfile.is_zipfile(path):  # torch's format
        raise RunError("it is no checkpoint", str(path), ANEW)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch and pickle make of a foreign file
        raise RunError(f"it cannot be read as a checkpoint ({first_line(error)[:120]})", str(path), ANEW) from error
    if not isinstance(state, dict) or (missing := [name for name in NEEDED if name not in state]):
        lacks = f" (it lacks {', '.join(missing)})" if isinstance(state, dict) else ""
        raise RunError(f"it is no checkpoint of acam-kd{lacks}", str(path), ANEW)
    tensors = state["state_dict"]
    if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
        raise RunError("it is no checkpoint of acam-kd (see state_dict)", str(path), ANEW)
    _update(state)
    return state


def _update(checkpoint: dict[str, Any]) -> None:
    """Turn a checkpoint of version 0.1, where student and distiller were parts of one model, into today's."""
    state = checkpoint["state_dict"]
    if "distiller" in checkpoint or not any(name.startswith("model.student.") for name in state):
        return
    learnt = {name: value for name, value in state.items() if name.startswith("model.distiller.")}
    checkpoint["distiller"] = {name.removeprefix("model.distiller."): value for name, value in learnt.items()}
    checkpoint["state_dict"] = {
        name.replace("model.student.", "model.", 1): value for name, value in state.items() if name not in learnt
    }
