"""MGD: masked generative distillation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core.distiller import NOTHING_KNOWN, Distiller, align_levels, check_weights
from ..core.errors import ConfigError
from ..core.features import Channels, Features
from ..core.registry import DISTILLER_REGISTRY
from ..core.targets import Targets
from .parts.generation import Generator, check_fraction
from .parts.losses import squared_error
from .recipes import RECIPES

__all__ = ["MGD", "keep_mask"]

DROPPED = ("positions", "channels")


def keep_mask(draw: Tensor, dropped: float) -> Tensor:
    """Return 1 where a uniform number from [0, 1) is below 1 - ``dropped``, else 0."""
    return (draw < 1 - dropped).to(draw.dtype)


@DISTILLER_REGISTRY.register()
class MGD(Distiller):
    """A generator that rebuilds the teacher's map from a random part of the student's positions; summed over levels.

    Yang et al., "Masked Generative Distillation", ECCV 2022:

        L = alpha / N sum ( G(m * align(F_S)) - F_T )^2

    The mask m is (N, 1, H, W); it drops each position with probability lambda, anew at every step. The generator G has
    two 3x3 convolutions with a ReLU between. The kept positions are not scaled up as in dropout, and the error is that
    of all positions, not of the dropped ones alone. For classification the authors drop channels: m is (N, C, 1, 1).
    A departure from the paper: the aligning convolution, which starts as the identity, is there also where the channels
    match. Logits are not aligned, and their generator has as many channels as there are classes.

    The error is a sum over C, H and W: weights do not transfer between image sizes. Recommended (the authors):
    alpha = 2e-5, lambda_mask = 0.65 for one-stage detectors (the defaults); 5e-7, 0.45 for two-stage ones; 2e-5, 0.75
    for the last features of a segmentor's backbone; 7e-5, 0.15 and channels for the last of a classifier. Gradients are
    clipped to a norm of 35 for detectors.

    Args:
        student_channels, teacher_channels: the levels to distil.
        alpha: weight.
        lambda_mask: lambda, the probability that one is dropped, in [0, 1]; 0 for the generator alone.
        dropped: ``"positions"``, or ``"channels"`` of the aligned map.

    Raises:
        ConfigError: an argument is out of range.

    Example:
        >>> import torch
        >>> method = MGD(student_channels={"p3": 16}, teacher_channels={"p3": 24}, alpha=2e-5)
        >>> losses = method({"p3": torch.rand(2, 16, 12, 20)}, {"p3": torch.rand(2, 24, 12, 20)})
        >>> sorted(losses)
        ['loss_mgd_generation']
    """

    recipes = RECIPES["MGD"]

    def __init__(
        self,
        student_channels: Channels,
        teacher_channels: Channels,
        *,
        alpha: float = 2e-5,
        lambda_mask: float = 0.65,
        dropped: str = "positions",
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        check_weights(alpha=alpha)
        check_fraction(lambda_mask=lambda_mask)
        if dropped not in DROPPED:
            raise ConfigError("dropped", dropped, " or ".join(DROPPED))
        self.alpha, self.lambda_mask, self.dropped = alpha, lambda_mask, dropped
        self.align = align_levels(self.student_levels, self.teacher_levels)
        self.generate = nn.ModuleDict({level: Generator(spec.channels) for level, spec in self.teacher_levels.items()})

    def draw(self, features: Tensor) -> Tensor:
        """Draw one uniform number for every position of every image, (N, 1, H, W), or every channel, (N, C, 1, 1)."""
        n, c, h, w = features.shape
        shape = (n, 1, h, w) if self.dropped == "positions" else (n, c, 1, 1)
        return torch.rand(shape, device=features.device)

    def forward(self, student: Features, teacher: Features, targets: Targets = NOTHING_KNOWN) -> dict[str, Tensor]:
        """Return ``loss_mgd_generation``."""
        errors, self._step = {}, {}
        for level in self.levels:
            aligned, target = self.align[level](student[level]), teacher[level].detach()
            mask = keep_mask(self.draw(aligned), self.lambda_mask)
            rebuilt = self.generate[level](mask.to(aligned) * aligned)
            errors[level] = squared_error(rebuilt, target)
            self._step[level] = mask, errors[level].detach() / math.prod(target.shape[1:])
        return {"loss_mgd_generation": self.alpha * sum(errors.values())}  # type: ignore[dict-item]

    def metrics(self) -> dict[str, Tensor]:
        """Return ``<level>/mse``: the unweighted error, averaged over channels and positions instead of summed."""
        return {f"{level}/mse": error for level, (_, error) in self._step.items()}

    def masks(self) -> dict[str, dict[str, Tensor]]:
        """Return, per level, the positions that the last step kept; nothing where channels are dropped."""
        if self.dropped == "channels":
            return {}
        return {level: {"spatial": mask} for level, (mask, _) in self._step.items()}
