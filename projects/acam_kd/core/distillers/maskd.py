"""MasKD: the error inside the regions that learnt tokens select on the teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distiller import NOTHING_KNOWN, Distiller, align_levels, check_weights
from ..features import Features, Pyramid
from ..losses import mask_diversity_loss, spatial_masked_mse
from ..registry import DISTILLER_REGISTRY
from ..targets import Targets
from ..token_files import frozen_tokens, untrained_tokens
from ..tokens import ReceptiveTokens

__all__ = ["MasKD"]

LOGITS_FACTOR = 0.5
"""Of the error on a logit map, as the authors' segmentation code has it."""
LOGITS_EPS = 1e-5
FEATURES_EPS = 1e-12


@DISTILLER_REGISTRY.register()
class MasKD(Distiller):
    r"""The squared error in soft regions that receptive tokens, learnt beforehand, select on the teacher.

    Huang et al., "Masked Distillation with Receptive Tokens", ICLR 2023. Per level, with the teacher's masks
    m_t = sigmoid(token_t . F_T) and the probabilities p_t that a small network gives them:

        L = mean_n sum_t p_t sum_{c,hw} (m_t (F_T - align(F_S)))^2 / (C sum_hw m_t),    alpha times the sum over levels

    After ``custom_mask_warmup`` steps m_t is multiplied by the mask of the student's own map, as a constant. On a
    logit map the loss is the authors' for segmentation: no probabilities, no custom mask, 0.5 times the mean over
    tokens. The tokens are learnt on the teacher in a stage of its own and are constants here.

    The authors: RetinaNet 7 with a warm-up of 7000 steps (8500 from an X101), FCOS and RepPoints 10 with 5000, Faster
    R-CNN 1 with 7330 (5000 from a Cascade Mask R-CNN); 6 tokens on five levels of the FPN. But for FCOS they add an L1
    or smooth L1 loss on the regression head's output, which is not here, and RetinaNet inherits neck and head.
    Segmentation: 1, 8 tokens. (This library's default of 1 for ``alpha`` is that of their class, and so is the
    warm-up.)

    Args:
        student, teacher: the levels to distil.
        alpha: weight.
        tokens: file of the learnt tokens; empty for untrained ones, which select nothing and are reported.
        num_tokens: T; 0 for the paper's: 6 on features, 8 on a logit map.
        custom_mask_warmup: training steps until the student's masks come in; 0 for from the start.
        weight_mask: weigh the tokens' errors by their probabilities; if not, all alike.

    Raises:
        FileNotFoundError, ValueError: there are no tokens at ``tokens``, or they are not this teacher's.
    """

    def __init__(
        self,
        student: Pyramid,
        teacher: Pyramid,
        *,
        alpha: float = 1.0,
        tokens: str = "",
        num_tokens: int = 0,
        custom_mask_warmup: int = 1000,
        weight_mask: bool = True,
    ) -> None:
        super().__init__(student, teacher)
        check_weights(alpha=alpha)
        if custom_mask_warmup < 0:
            raise ValueError(
                f"custom_mask_warmup must not be negative, found {custom_mask_warmup} (key: CUSTOM_MASK_WARMUP)"
            )
        self.alpha, self.custom_mask_warmup, self.weight_mask = alpha, custom_mask_warmup, weight_mask
        self.align = align_levels(student, teacher)
        self.tokens = frozen_tokens("MasKD", teacher, num_tokens, tokens)
        self.logits = {level for level, spec in teacher.items() if spec.logits}
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # in the checkpoint, for a resumed run
        self._path = tokens
        self._last: dict[str, tuple[Tensor, Tensor]] = {}

    def forward(self, student: Features, teacher: Features, targets: Targets = NOTHING_KNOWN) -> dict[str, Tensor]:
        """Return ``loss_maskd_feature``."""
        losses, self._last = [], {}
        for level in self.levels:
            loss, masks = self._loss(level, self.align[level](student[level]), teacher[level].detach())
            losses.append(loss)
            self._last[level] = masks, loss.detach()
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
                custom = tokens(aligned)  # chosen without asking the device how many steps were made
                masks = masks * torch.where(self.steps >= self.custom_mask_warmup, custom, torch.ones_like(custom))
                weights = tokens.weights(teacher) if self.weight_mask else None
        if level in self.logits:
            return LOGITS_FACTOR * spatial_masked_mse(aligned, teacher, masks, eps=LOGITS_EPS), masks
        return spatial_masked_mse(aligned, teacher, masks, weights, FEATURES_EPS), masks

    def metrics(self) -> dict[str, Tensor]:
        """Per level the error, and the mean and the Dice overlap of the masks."""
        values: dict[str, Tensor] = {}
        for level, (masks, error) in self._last.items():
            if masks.numel():
                values[f"{level}/mask_mean"] = masks.mean()
                values[f"{level}/dice"] = mask_diversity_loss(masks)
                values[f"{level}/error"] = error
        return values

    def masks(self) -> dict[str, dict[str, Tensor]]:
        """Per level the masks of the last step."""
        return {level: {"spatial": masks} for level, (masks, _) in self._last.items()}

    def warnings(self) -> dict[str, str]:
        """Tokens that nobody has learnt."""
        return untrained_tokens(self._path)
