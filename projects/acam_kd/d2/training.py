"""What a trainer needs so that a killed run resumes whole and a broken one leaves a good checkpoint."""

from __future__ import annotations

import math
from typing import Any

import torch
from detectron2.engine import DefaultTrainer
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from .meta_arch import DistillationMetaArch

__all__ = ["checkpoint_distiller", "guard_gradients"]


def checkpoint_distiller(trainer: DefaultTrainer) -> None:
    """Save and resume the distiller beside the student in every checkpoint of this trainer.

    Call it between building the trainer and ``resume_or_load``. Without it checkpoints hold the student and the
    optimizer only, and a resumed run would start with a new distiller. It does nothing for a model that
    distils nothing.
    """
    model = trainer.model
    if isinstance(model, DistributedDataParallel):
        model = model.module
    if isinstance(model, DistillationMetaArch) and model.distiller is not None:
        trainer.checkpointer.add_checkpointable("distiller", model.distiller)


def guard_gradients(optimizer: torch.optim.Optimizer, model: nn.Module, max_norm: float = 0.0) -> None:
    """Before every step clip the norm of all gradients together, and stop if it is not finite.

    Detectron2's own clipping is per parameter. The check keeps a diverged run from writing its weights into the
    next checkpoint. Under AMP in float16 the scaler has unscaled the gradients by then, and skips
    the steps that overflowed.

    Args:
        optimizer: gets a hook.
        model: names the parameters in the error.
        max_norm: the largest norm allowed; 0 for any.

    Raises:
        FloatingPointError: at a step whose gradient is not finite, with the parameters concerned.
    """

    def before_step(*_: Any) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
        norm = clip_grad_norm_([p for _, p in named], max_norm or math.inf)
        if not bool(norm.isfinite()):
            bad = [name for name, p in named if p.grad is not None and not bool(p.grad.isfinite().all())]
            shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
            raise FloatingPointError(f"iteration {get_event_storage().iter}: the gradient is not finite in {shown}")

    optimizer.register_step_pre_hook(before_step)
