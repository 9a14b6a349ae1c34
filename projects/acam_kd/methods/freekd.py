"""FreeKD: the error of the high frequencies at the positions that learnt prompts select on the teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.distiller import NOTHING_KNOWN, Distiller, align_levels, check_weights
from ..core.features import BACKBONE, Channels, Features
from ..core.registry import DISTILLER_REGISTRY
from ..core.targets import Targets
from .parts.losses import check_shapes, full_precision, mse
from .parts.token_files import frozen_tokens, untrained_tokens
from .parts.tokens import SCALES, token_masks
from .parts.wavelets import haar_levels
from .recipes import RECIPES

__all__ = ["FreeKD", "frequency_loss"]


@full_precision
def frequency_loss(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    r"""Compute the masked L1 distance of the high passes of two maps, summed over the scales of their Haar transforms.

    .. math:: L = \sum_j \mathrm{mean}_{n,t,c,o,p} | m_{j,t} (B_j^S - B_j^T) |,
              \quad m_{j,t} = \mathrm{sigmoid}(token_{j,t} \cdot \sum_o B_{j,o}^T)

    over orientations o and positions p. Since masks are positive, |D| times the mean mask over t is the same.

    Args:
        student, teacher: (N, C, H, W), of equal shape.
        tokens: (3, T, C), for the finest scale first.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    check_shapes(student, teacher)
    _, highs = haar_levels(teacher, SCALES)
    with torch.no_grad():
        keep = [token_masks(high.sum(2), token).mean(1) for high, token in zip(highs, tokens)]
    return _masked_l1(haar_levels(student, SCALES)[1], highs, keep)


def _masked_l1(student: Sequence[Tensor], teacher: Sequence[Tensor], keep: Sequence[Tensor]) -> Tensor:
    """Sum the distances over scales; maps (N, C, 3, H_j, W_j), ``keep`` (N, H_j, W_j)."""
    distances = [
        torch.einsum("ncohw,nhw->", (s - t).abs(), k) / max(s.numel(), 1) for s, t, k in zip(student, teacher, keep)
    ]
    return torch.stack(distances).sum()


@DISTILLER_REGISTRY.register()
class FreeKD(Distiller):
    """The error of the high frequencies, masked by prompts learnt on the teacher, plus the plain error.

    Zhang et al., "FreeKD: Knowledge Distillation via Semantic Frequency Prompt", CVPR 2024. Per level both maps go
    through a Haar transform of three scales; prompts select, on the teacher's high passes, the positions that count:

        L = alpha sum_j mean |m_j (B_j(align(F_S)) - B_j(F_T))| + lambda_mse mean (align(F_S) - F_T)^2

    summed over levels. It follows the authors' code: the low pass counts in the plain error alone, and the
    position-aware weight of the paper is not used. The prompts are learnt on the teacher before and are constants
    here.

    Recommended (the authors): ``alpha`` 1, 6 prompts on all levels, and ``lambda_mse`` 5 for RetinaNet, 2 in their
    config of a Faster R-CNN from a Cascade Mask R-CNN; gradients clipped at 35. They add a smooth L1 loss on the
    regression head's output, which is not here. For FCOS no config is published; that of RetinaNet is an assumption.

    Args:
        student_channels, teacher_channels: the levels to distil.
        alpha: weight of the high frequencies.
        lambda_mse: weight of the plain error.
        tokens: file of the learnt prompts. A run of an engine learns them into it if it does not exist, and into its
            own folder if ``tokens`` is empty. Elsewhere empty means untrained ones, which select nothing and are
            reported.
        num_tokens: T; 0 for the paper's 6.
        token_iterations: the steps of a run that learns the prompts.

    Raises:
        ConfigError: a number is out of range, or the file ``tokens`` has no prompts for this teacher.

    Example:
        >>> import torch
        >>> method = FreeKD(student_channels={"p3": 16}, teacher_channels={"p3": 24}, alpha=1.0)
        >>> losses = method({"p3": torch.rand(2, 16, 12, 20)}, {"p3": torch.rand(2, 24, 12, 20)})
        >>> sorted(losses)
        ['loss_freekd_frequency', 'loss_freekd_mse']
    """

    reads = (BACKBONE,)
    recipes = RECIPES["FreeKD"]

    def __init__(
        self,
        student_channels: Channels,
        teacher_channels: Channels,
        *,
        alpha: float = 1.0,
        lambda_mse: float = 5.0,
        tokens: str = "",
        num_tokens: int = 0,
        token_iterations: int = 2000,
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        check_weights(alpha=alpha, lambda_mse=lambda_mse)
        self.alpha, self.lambda_mse = alpha, lambda_mse
        self.align = align_levels(self.student_levels, self.teacher_levels)
        self.tokens = frozen_tokens("FreeKD", self.teacher_levels, num_tokens, tokens)
        self._path = tokens

    def forward(self, student: Features, teacher: Features, targets: Targets = NOTHING_KNOWN) -> dict[str, Tensor]:
        """Return ``loss_freekd_frequency`` and ``loss_freekd_mse``."""
        self._step = {}
        frequencies, errors = [], []
        for level in self.levels:
            aligned, target = self.align[level](student[level]), teacher[level].detach()
            frequencies.append(frequency_loss(aligned, target, self.tokens[level].tokens[1:]))  # type: ignore[index]
            errors.append(mse(aligned, target))
            self._step[level] = frequencies[-1].detach(), errors[-1].detach()
        return {
            "loss_freekd_frequency": self.alpha * torch.stack(frequencies).sum(),
            "loss_freekd_mse": self.lambda_mse * torch.stack(errors).sum(),
        }

    def metrics(self) -> dict[str, Tensor]:
        """Return, per level, both errors without their weights."""
        values = {f"{level}/frequency": frequency for level, (frequency, _) in self._step.items()}
        return values | {f"{level}/mse": error for level, (_, error) in self._step.items()}

    def warnings(self) -> dict[str, str]:
        """Report untrained prompts."""
        return untrained_tokens(self._path)
