"""Checkpoints with the method in them, and a guard that keeps bad gradients out of them."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils.events import get_event_storage, has_event_storage
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from ..core import ConfigError, Distillation, RunError, clip_gradients
from ..core.errors import first_line
from ..core.form import odd_optimizer, odd_part
from .distillation import D2Distillation

__all__ = ["check_after_backward", "checkpoint_distiller", "guard_gradients"]


def checkpoint_distiller(trainer: Any) -> None:
    """Save and resume, beside the student in every checkpoint, what else a run has learnt.

    That is the entry ``distiller``, what the method has learnt, and ``loss_normalizer``, the running normaliser of
    Detectron2's dense detectors, which Detectron2 itself forgets. Call it before ``resume_or_load``. Without it
    checkpoints hold the student and the optimizer only, and a resumed run starts with a new method.

    On CPU it also switches TorchScript's fusion off: Detectron2's focal loss is a script, whose first calls in a
    process are rounded otherwise than the later ones, so that no run could be repeated bit for bit.

    Args:
        trainer: a trainer with a ``checkpointer``, as DefaultTrainer, or the Checkpointer itself, as the one in
            Detectron2's ``lazyconfig_train_net.py`` and ``plain_train_net.py``.

    Raises:
        ConfigError: it is neither, or its optimizer does not have the method's parameters.
    """
    checkpointer = trainer if isinstance(trainer, Checkpointer) else getattr(trainer, "checkpointer", None)
    if not isinstance(checkpointer, Checkpointer):
        raise ConfigError(
            "trainer", f"a {type(trainer).__name__} without a checkpointer", "a DefaultTrainer or a Checkpointer",
            "write checkpoint_distiller(checkpointer)",
        )  # fmt: skip
    model = checkpointer.model  # without DistributedDataParallel
    distillation = getattr(model, "distillation", None)
    if isinstance(distillation, Distillation):
        inner = getattr(trainer, "_trainer", trainer)
        _check_optimizer(
            getattr(inner, "optimizer", None) or checkpointer.checkpointables.get("optimizer"), distillation
        )
        checkpointer.add_checkpointable("distiller", distillation)
        # First, so that a checkpoint of another method says so before its optimizer does.
        others = checkpointer.checkpointables
        checkpointer.checkpointables = {"distiller": others.pop("distiller"), **others}
    for name in ("trainer", "optimizer"):
        if name in checkpointer.checkpointables:
            checkpointer.checkpointables[name] = _Explained(checkpointer.checkpointables[name])
    if next(model.parameters()).device.type == "cpu":
        torch.jit.set_fusion_strategy([("STATIC", 0), ("DYNAMIC", 0)])
    if isinstance(model, DenseDetector):
        checkpointer.add_checkpointable("loss_normalizer", _LossNormalizer(model))


def check_after_backward(trainer: SimpleTrainer) -> None:
    """Look at the losses after the backward, where Detectron2's trainer waits for the device in any case.

    Otherwise they are looked at in the forward, and a GPU is idle until the backward is launched.

    Args:
        trainer: the one that makes the steps; of a DefaultTrainer the attribute ``_trainer``.
    """
    distillation = getattr(getattr(trainer.model, "module", trainer.model), "distillation", None)
    if isinstance(distillation, D2Distillation):
        distillation.deferred = True
        trainer.register_hooks([_LossCheck(distillation)])


class _LossCheck(HookBase):
    """The check of a step's losses between backward and step."""

    def __init__(self, distillation: D2Distillation) -> None:
        self.distillation = distillation

    def after_backward(self) -> None:
        self.distillation.check_losses()


def _check_optimizer(optimizer: Any, distillation: Distillation) -> None:
    """Raise ConfigError for an optimizer that trains none of the method's parameters."""
    own = {id(p) for p in distillation.method.parameters() if p.requires_grad}
    if not isinstance(optimizer, torch.optim.Optimizer) or not own:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not own & held:
        raise ConfigError(
            "optimizer", "none of the method's parameters", "all of them",
            "they would stay at their random start: build it from model.parameters(), or add "
            "model.distillation.parameters()",
        )  # fmt: skip


class _Explained:
    """A trainer or an optimizer that says in one line that a checkpoint is of a run with other parameters."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state: Any) -> None:
        try:
            if odd := self._odd(state):
                raise ValueError(f"see {odd}")
            self.inner.load_state_dict(state)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            if isinstance(error, RunError):
                raise
            raise RunError(
                f"the checkpoint is of a run with other parameters: {first_line(error)}", "resuming",
                "resume with the same {method} and options, or start a new run from the student's weights",
            ) from error  # fmt: skip

    def _odd(self, state: Any) -> str:
        own = self.inner.state_dict()
        if not isinstance(self.inner, torch.optim.Optimizer):
            return odd_part(state, own, "trainer")
        return odd_optimizer(state, own, [p for group in self.inner.param_groups for p in group["params"]])


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


def guard_gradients(
    optimizer: torch.optim.Optimizer, model: nn.Module, max_norm: float = 0.0, *, every: int = 1
) -> None:
    """Before every step clip the norm of all gradients together, and stop if it is not finite.

    Detectron2's own clipping is per parameter. The check keeps a diverged run from writing its weights into the
    next checkpoint. Under AMP in float16 the scaler has unscaled the gradients by then, and skips
    the steps that overflowed.

    Args:
        optimizer: gets a hook.
        model: names the parameters in the error.
        max_norm: the largest norm allowed; 0 for any.
        every: calls of ``step`` for one real step, for an optimizer that accumulates gradients and steps at every
            N-th call. Partial sums are left alone.

    Raises:
        ConfigError: a negative norm, ``every`` below 1, or an optimizer without the method's parameters.
        RunError: at a step whose gradient is not finite, with the parameters concerned.
    """
    if not max_norm >= 0:
        raise ConfigError("max_gradient_norm", max_norm, ">= 0")
    if every < 1:
        raise ConfigError("every", every, ">= 1")
    distillation = getattr(model, "distillation", None)
    if isinstance(distillation, Distillation):
        _check_optimizer(optimizer, distillation)
    calls = 0
    inside = False

    def before_step(*_: Any) -> None:
        nonlocal calls, inside
        if inside:  # an accumulating step that calls the optimizer's own
            return
        calls += 1
        if calls % every == 0:
            when = f"iteration {get_event_storage().iter}" if has_event_storage() else f"step {calls // every - 1}"
            clip_gradients(model, max_norm, when=when)
        inside = True

    def after_step(*_: Any) -> None:
        nonlocal inside
        inside = False

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)
