"""CWD: channel-wise distillation."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..core.distiller import NOTHING_KNOWN, Distiller, align_levels, check_weights
from ..core.features import Channels, Features
from ..core.registry import DISTILLER_REGISTRY
from ..core.targets import Targets
from .parts.losses import check_shapes, check_temperature, full_precision
from .recipes import RECIPES

__all__ = ["CWD", "channel_wise_divergence"]


@full_precision
def channel_wise_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    r"""Compute the divergence between the teacher's and the student's distributions over positions, per channel.

    .. math:: L = \frac{\tau^2}{NC} \sum_{n,c} KL(\sigma_{hw}(T_{nc} / \tau) \,\Vert\, \sigma_{hw}(S_{nc} / \tau))

    with the softmax sigma over the H x W positions of one channel. Adding a constant to a channel changes nothing.

    Args:
        student, teacher: (N, C, H, W).
        temperature: tau; a smaller one gives more weight to the largest positions.

    Raises:
        ValueError: the shapes differ.
    """
    check_shapes(student, teacher)
    student_log, teacher_log = ((x.flatten(2) / temperature).log_softmax(2) for x in (student, teacher))
    divergence = F.kl_div(student_log, teacher_log, reduction="sum", log_target=True)
    return temperature**2 * divergence / max(student.shape[0] * student.shape[1], 1)


@DISTILLER_REGISTRY.register()
class CWD(Distiller):
    """Channel-wise distillation: each channel is a distribution over positions to match; summed over levels.

    Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021:

        L = alpha tau^2 / (N C) sum_{n,c} KL( softmax_hw(F_T / tau) || softmax_hw(align(F_S) / tau) )

    Recommended: alpha = 10, temperature = 1 on every level of a detector's pyramid (the defaults; MMRazor, for GFL);
    alpha = 3, temperature = 4 on a segmentor's logits (the authors); alpha = 50, temperature = 4 on its last
    features (CIRKD). Logits are compared class by class; features go through an aligning 1x1 convolution, which
    starts as the identity. A departure from the paper: it is there also where the channels match.

    Args:
        student_channels, teacher_channels: the levels to distil.
        alpha: weight.
        temperature: tau, positive.

    Raises:
        ConfigError: the weight or the temperature is out of range.

    Example:
        >>> import torch
        >>> method = CWD(student_channels={"p3": 16}, teacher_channels={"p3": 24}, alpha=10.0, temperature=1.0)
        >>> losses = method({"p3": torch.rand(2, 16, 12, 20)}, {"p3": torch.rand(2, 24, 12, 20)})
        >>> sorted(losses)
        ['loss_cwd_kl']
    """

    recipes = RECIPES["CWD"]

    def __init__(
        self, student_channels: Channels, teacher_channels: Channels, *, alpha: float = 10.0, temperature: float = 1.0
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        check_weights(alpha=alpha)
        check_temperature(temperature)
        self.alpha, self.temperature = alpha, temperature
        self.align = align_levels(self.student_levels, self.teacher_levels)

    def forward(self, student: Features, teacher: Features, targets: Targets = NOTHING_KNOWN) -> dict[str, Tensor]:
        """Return ``loss_cwd_kl``."""
        divergences = {
            level: channel_wise_divergence(self.align[level](student[level]), teacher[level].detach(), self.temperature)
            for level in self.levels
        }
        self._step = {level: divergence.detach() for level, divergence in divergences.items()}
        return {"loss_cwd_kl": self.alpha * sum(divergences.values())}  # type: ignore[dict-item]

    def metrics(self) -> dict[str, Tensor]:
        """Return ``<level>/kl``."""
        return {f"{level}/kl": divergence for level, divergence in self._step.items()}
