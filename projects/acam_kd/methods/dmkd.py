"""DMKD: dual masked distillation, a reconstruction from the abstract."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core.distiller import NOTHING_KNOWN, Distiller, align_levels, check_weights
from ..core.features import BACKBONE, Channels, Features
from ..core.registry import DISTILLER_REGISTRY
from ..core.targets import Targets
from .parts.attention import attention_of
from .parts.generation import Generator, check_fraction, hide_largest, rebuilt_of_two
from .parts.losses import squared_error
from .recipes import RECIPES

__all__ = ["DMKD", "hide_largest"]

TEMPERATURE = 0.5
"""The temperature of the attention, that of FGD; the order of positions and channels does not depend on it."""


@DISTILLER_REGISTRY.register()
class DMKD(Distiller):
    """Two generators that rebuild the teacher's map after the most important positions, or channels, are hidden.

    It is a RECONSTRUCTION from the abstract of "DMKD: Improving Feature-based Knowledge Distillation for Object
    Detection via Dual Masking Augmentation" (ICASSP 2024, arXiv 2309.02719). The paper's equations, thresholds and
    weights were not at hand and no code is public, so results are not those of the paper. The parts that the abstract
    leaves open come from FGD (the attention) and MGD (the generator, the error). Per level, summed over levels:

        B_s = 0 at the rho_s HW positions of largest spatial attention of F_T, else 1
        B_c = 0 for the rho_c C channels of largest channel attention of F_T, else 1
        R_s = G_s(B_s * align(F_S)),    R_c = G_c(B_c * align(F_S)),    w = softmax(a_s, a_c)
        L   = alpha / N sum ( w_s R_s + w_c R_c - F_T )^2

    The masks hide parts of the student's map; the counts are rounded down. G_s and G_c are generators of MGD; a_s and
    a_c are learnt and equal at the start. The masks come from the teacher alone, so they cannot collapse.

    Suggested (not published; those of MGD): alpha = 2e-5, rho_s = 0.65, rho_c = 0.15 for one-stage detectors (the
    defaults); 5e-7, 0.45, 0.15 for two-stage ones. Clip gradients to a norm of 35.

    Args:
        student_channels, teacher_channels: the levels to distil, of a backbone.
        alpha: weight.
        rho_s: fraction of the positions that are hidden, in [0, 1].
        rho_c: fraction of the channels that are hidden, in [0, 1].

    Raises:
        ConfigError: an argument is out of range.

    Example:
        >>> import torch
        >>> method = DMKD(student_channels={"p3": 16}, teacher_channels={"p3": 24}, alpha=2e-5)
        >>> losses = method({"p3": torch.rand(2, 16, 12, 20)}, {"p3": torch.rand(2, 24, 12, 20)})
        >>> sorted(losses)
        ['loss_dmkd_generation']
    """

    reads = (BACKBONE,)
    recipes = RECIPES["DMKD"]

    def __init__(
        self,
        student_channels: Channels,
        teacher_channels: Channels,
        *,
        alpha: float = 2e-5,
        rho_s: float = 0.65,
        rho_c: float = 0.15,
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        check_weights(alpha=alpha)
        check_fraction(rho_s=rho_s, rho_c=rho_c)
        self.alpha, self.rho_s, self.rho_c = alpha, rho_s, rho_c
        self.align = align_levels(self.student_levels, self.teacher_levels)
        self.generate_s = nn.ModuleDict(
            {level: Generator(spec.channels) for level, spec in self.teacher_levels.items()}
        )
        self.generate_c = nn.ModuleDict(
            {level: Generator(spec.channels) for level, spec in self.teacher_levels.items()}
        )
        self.balance = nn.ParameterDict({level: nn.Parameter(torch.zeros(2)) for level in self.teacher_levels})

    def forward(self, student: Features, teacher: Features, targets: Targets = NOTHING_KNOWN) -> dict[str, Tensor]:
        """Return ``loss_dmkd_generation``."""
        errors, self._step = {}, {"masks": {}, "metrics": {}}
        for level in self.levels:
            aligned, target = self.align[level](student[level]), teacher[level].detach()
            spatial, channel = self._hide(target)
            weights = self.balance[level].softmax(0)
            generators = self.generate_s[level], self.generate_c[level]
            errors[level] = squared_error(rebuilt_of_two(aligned, spatial, channel, generators, weights), target)
            self._step["masks"][level] = {"spatial": spatial, "channel": channel[:, None]}
            self._step["metrics"][f"{level}/mse"] = errors[level].detach() / math.prod(target.shape[1:])
            self._step["metrics"][f"{level}/spatial_weight"] = weights[0].detach()
        return {"loss_dmkd_generation": self.alpha * sum(errors.values())}  # type: ignore[dict-item]

    def _hide(self, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return the masks of one level, (N, 1, H, W) and (N, C)."""
        attention = attention_of(teacher, TEMPERATURE)
        spatial = hide_largest(attention.spatial.flatten(1), self.rho_s).view_as(attention.spatial)
        return spatial[:, None], hide_largest(attention.channel, self.rho_c)

    def metrics(self) -> dict[str, Tensor]:
        """Return, per level, the unweighted error as a mean over channels and positions, and w_s."""
        return dict(self._step.get("metrics", {}))

    def masks(self) -> dict[str, dict[str, Tensor]]:
        """Return, per level, the positions and channels that the last step kept."""
        return dict(self._step.get("masks", {}))
