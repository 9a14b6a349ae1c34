"""MasKD: the error inside regions of the teacher's map that learnt tokens select."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.distiller import NOTHING_KNOWN, Distiller, align_levels, check_weights
from ..core.errors import ConfigError
from ..core.features import Channels, Features
from ..core.registry import DISTILLER_REGISTRY
from ..core.targets import Targets
from .parts.losses import mask_diversity_loss, spatial_masked_mse
from .parts.token_files import frozen_tokens, untrained_tokens
from .parts.tokens import ReceptiveTokens
from .recipes import RECIPES

__all__ = ["MasKD"]

LOGITS_FACTOR = 0.5
"""The factor of the error on a logit map, that of the authors' segmentation code."""
LOGITS_EPS = 1e-5
FEATURES_EPS = 1e-12


@DISTILLER_REGISTRY.register()
class MasKD(Distiller):
    r"""The squared error in soft regions of the teacher's map, selected by receptive tokens.

    Huang et al., "Masked Distillation with Receptive Tokens", ICLR 2023. Per level, with the teacher's masks
    m_t = sigmoid(token_t . F_T) and the probabilities p_t that a small network gives them:

        L = mean_n sum_t p_t sum_{c,hw} (m_t (F_T - align(F_S)))^2 / (C sum_hw m_t),    alpha times the sum over levels

    After ``custom_mask_warmup`` steps m_t is multiplied by the mask of the student's own map, as a constant. On a
    logit map the loss is the authors' for segmentation: no probabilities, no custom mask, 0.5 times the mean over
    tokens. The tokens are learnt on the teacher before and are constants here.

    Recommended (the authors), as ``alpha`` and warm-up: RetinaNet 7 and 7000 steps (8500 from an X101); FCOS and
    RepPoints 10 and 5000; Faster R-CNN 1 and 7330 (5000 from a Cascade Mask R-CNN). They use 6 tokens on five levels of
    the FPN. Except for FCOS they add an L1 or smooth L1 loss on the regression head's output, which is not here.
    RetinaNet inherits neck and head. Segmentation: ``alpha`` 1, 8 tokens. The defaults of ``alpha`` and of the warm-up
    are those of the authors' class.

    Args:
        student_channels, teacher_channels: the levels to distil.
        alpha: weight.
        tokens: file of the learnt tokens. A run of an engine learns them into it if it does not exist, and into its
            own folder if ``tokens`` is empty. Elsewhere empty means untrained ones, which select nothing and are
            reported.
        num_tokens: T; 0 for the paper's number: 6 on features, 8 on a logit map.
        token_iterations: the steps of a run that learns the tokens.
        custom_mask_warmup: training steps before the student's masks are used; 0 to use them from the start.
        weight_mask: weigh the tokens' errors by their probabilities; if not, all equally.

    Raises:
        ConfigError: a number is out of range, or the file ``tokens`` has no tokens for this teacher.

    Example:
        >>> import torch
        >>> method = MasKD(student_channels={"p3": 16}, teacher_channels={"p3": 24}, alpha=1.0)
        >>> losses = method({"p3": torch.rand(2, 16, 12, 20)}, {"p3": torch.rand(2, 24, 12, 20)})
        >>> sorted(losses)
        ['loss_maskd_feature']
    """

    recipes = RECIPES["MasKD"]

    def __init__(
        self,
        student_channels: Channels,
        teacher_channels: Channels,
        *,
        alpha: float = 1.0,
        tokens: str = "",
        num_tokens: int = 0,
        token_iterations: int = 2000,
        custom_mask_warmup: int = 1000,
        weight_mask: bool = True,
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        check_weights(alpha=alpha)
        if custom_mask_warmup < 0:
            raise ConfigError("custom_mask_warmup", custom_mask_warmup, ">= 0")
        self.alpha, self.custom_mask_warmup, self.weight_mask = alpha, custom_mask_warmup, weight_mask
        self.align = align_levels(self.student_levels, self.teacher_levels)
        self.tokens = frozen_tokens("MasKD", self.teacher_levels, num_tokens, tokens)
        self.logits = {level for level, spec in self.teacher_levels.items() if spec.logits}
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # in the checkpoint, for a resumed run
        self._path = tokens

    def forward(self, student: Features, teacher: Features, targets: Targets = NOTHING_KNOWN) -> dict[str, Tensor]:
        """Return ``loss_maskd_feature``."""
        losses, self._step = [], {}
        for level in self.levels:
            loss, masks = self._loss(level, self.align[level](student[level]), teacher[level].detach())
            losses.append(loss)
            self._step[level] = masks, loss.detach()
        if self.training:
            self.steps += 1
        return {"loss_maskd_feature": self.alpha * torch.stack(losses).sum()}

    def _loss(self, level: str, aligned: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.tokens[level]
        assert isinstance(tokens, ReceptiveTokens)
        with torch.no_grad():
            masks = tokens(teacher)
            if level in self.logits:
                weights = None
            else:
                custom = tokens(aligned)  # torch.where below, so that the number of steps stays on the device
                masks = masks * torch.where(self.steps >= self.custom_mask_warmup, custom, torch.ones_like(custom))
                weights = tokens.weights(teacher) if self.weight_mask else None
        if level in self.logits:
            return LOGITS_FACTOR * spatial_masked_mse(aligned, teacher, masks, eps=LOGITS_EPS), masks
        return spatial_masked_mse(aligned, teacher, masks, weights, FEATURES_EPS), masks

    def metrics(self) -> dict[str, Tensor]:
        """Return, per level, the error, and the mean and the Dice overlap of the masks."""
        values: dict[str, Tensor] = {}
        for level, (masks, error) in self._step.items():
            if masks.numel():
                values[f"{level}/mask_mean"] = masks.mean()
                values[f"{level}/dice"] = mask_diversity_loss(masks)
                values[f"{level}/error"] = error
        return values

    def masks(self) -> dict[str, dict[str, Tensor]]:
        """Return, per level, the masks of the last step."""
        return {level: {"spatial": masks} for level, (masks, _) in self._step.items()}

    def warnings(self) -> dict[str, str]:
        """Report untrained tokens."""
        return untrained_tokens(self._path)
