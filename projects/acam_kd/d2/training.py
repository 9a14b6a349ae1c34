"""What a trainer needs so that a killed run resumes whole and a broken one leaves a good checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.engine import DefaultTrainer
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..core import clip_gradients
from .meta_arch import DistillationMetaArch

__all__ = ["checkpoint_distiller", "guard_gradients"]


def checkpoint_distiller(trainer: DefaultTrainer) -> None:
    """Save and resume, beside the student in every checkpoint of this trainer, what else a run has learnt.

    That is the distiller, and the running loss normaliser of Detectron2's dense detectors, which Detectron2
    itself forgets. Call it between building the trainer and ``resume_or_load``. Without it checkpoints hold the
    student and the optimizer only, and a resumed run would start with a new distiller.

    On CPU it also switches TorchScript's fusion off: Detectron2's focal loss is a script, whose first calls in a
    process are rounded otherwise than the later ones, so that no run could be repeated bit for bit.
    """
    model = trainer.model
    if isinstance(model, DistributedDataParallel):
        model = model.module
    if isinstance(model, DistillationMetaArch):
        if model.distiller is not None:
            trainer.checkpointer.add_checkpointable("distiller", model.distiller)
        model = model.student
    if next(model.parameters()).device.type == "cpu":
        torch.jit.set_fusion_strategy([("STATIC", 0), ("DYNAMIC", 0)])
    if isinstance(model, DenseDetector):
        trainer.checkpointer.add_checkpointable("loss_normalizer", _LossNormalizer(model))


class _LossNormalizer:
    """The moving average by which RetinaNet and FCOS divide their losses: a plain attribute, in no state_dict.

    Every process has its own; the checkpoint keeps that of the first.
    """

    def __init__(self, detector: DenseDetector) -> None:
        self.detector = detector

    def state_dict(self) -> dict[str, float]:
        value = getattr(self.detector, "loss_normalizer", None)  # made by the first training step
        return {} if value is None else {"loss_normalizer": float(value)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        for name, value in state.items():
            setattr(self.detector, name, value)


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
    if max_norm < 0:
        raise ValueError(f"DISTILL.MAX_GRADIENT_NORM must not be negative, found {max_norm}")

    def before_step(*_: Any) -> None:
        clip_gradients(model, max_norm, when=f"iteration {get_event_storage().iter}")

    optimizer.register_step_pre_hook(before_step)
