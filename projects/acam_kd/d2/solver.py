"""Optimizers and learning-rate schedules: Detectron2's, AdamW, and the polynomial decay of segmentation."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from detectron2.solver import build_lr_scheduler as build_detectron2_lr_scheduler
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.solver.lr_scheduler import WarmupParamScheduler
from fvcore.common.param_scheduler import ParamScheduler
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ..core.errors import ConfigError

__all__ = ["PolynomialDecay", "build_lr_scheduler", "build_optimizer"]

OPTIMIZERS = ("SGD", "ADAMW")
POSITIONS = ("pos_embed", "rel_pos_h", "rel_pos_w", "relative_position_bias_table")
"""The parameters of positions in Detectron2's transformers."""


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that SOLVER.OPTIMIZER names: Detectron2's SGD, or AdamW with the same keys.

    With AdamW no weight decay acts on the positions of a transformer. On normalisation SOLVER.WEIGHT_DECAY_NORM acts.

    Raises:
        ConfigError: another name.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER not in OPTIMIZERS:
        raise ConfigError("SOLVER.OPTIMIZER", solver.OPTIMIZER, f"one of {', '.join(OPTIMIZERS)}")
    if solver.OPTIMIZER == "SGD":
        return build_detectron2_optimizer(cfg, model)
    parameters = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        overrides={name: {"weight_decay": 0.0} for name in POSITIONS},
    )
    optimizer = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
    return optimizer(parameters, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)


class PolynomialDecay(ParamScheduler):
    """The decay from 1 down to a floor, ``floor + (1 - floor) (1 - where)^power``.

    It is the schedule of DeepLab (Chen et al., "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets,
    Atrous Convolution, and Fully Connected CRFs", section 4.1). The floor is from mmsegmentation's recipes; fvcore's
    own polynomial decay ends at 0.

    Args:
        power: the exponent; 1 gives a straight line.
        floor: the factor at the end, as a fraction of that at the beginning.
    """

    def __init__(self, *, power: float, floor: float) -> None:
        self.power, self.floor = power, floor

    def __call__(self, where: float) -> float:
        """Return the factor at ``where``, which runs from 0 (the beginning) to 1 (the end)."""
        return self.floor + (1 - self.floor) * max(0.0, 1 - where) ** self.power


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Build the schedule that SOLVER.LR_SCHEDULER_NAME names.

    "WarmupPolyLR" begins with the warm-up of Detectron2's SOLVER.WARMUP_* keys. After it the learning rate is
    ``end + (base - end) (1 - it / max)^p``, with SOLVER.BASE_LR_END, BASE_LR, MAX_ITER and POLY_LR_POWER. The power
    is 0.9 where its key does not exist. Every other name is one of Detectron2's.

    Raises:
        ConfigError: SOLVER.BASE_LR_END is not between 0 and SOLVER.BASE_LR, or POLY_LR_CONSTANT_ENDING is set.
    """
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != "WarmupPolyLR":
        return build_detectron2_lr_scheduler(cfg, optimizer)
    if solver.get("POLY_LR_CONSTANT_ENDING", 0.0):
        raise ConfigError(
            "SOLVER.POLY_LR_CONSTANT_ENDING",
            solver.POLY_LR_CONSTANT_ENDING,
            allowed="0",
            hint="set the learning rate at the end by SOLVER.BASE_LR_END",
        )
    if not 0 <= solver.BASE_LR_END <= solver.BASE_LR or not solver.BASE_LR:
        raise ConfigError(
            "SOLVER.BASE_LR_END", solver.BASE_LR_END, allowed=f"0 to SOLVER.BASE_LR, {solver.BASE_LR}, which is above 0"
        )
    decay = WarmupParamScheduler(
        PolynomialDecay(power=solver.get("POLY_LR_POWER", 0.9), floor=solver.BASE_LR_END / solver.BASE_LR),
        solver.WARMUP_FACTOR,
        min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
        solver.WARMUP_METHOD,
        solver.RESCALE_INTERVAL,
    )
    return LRMultiplier(optimizer, decay, max_iter=solver.MAX_ITER)
