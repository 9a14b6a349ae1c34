"""Learnt tokens that select parts of a feature map: MasKD's receptive tokens and FreeKD's frequency prompts.

Letters: N images, C channels, H x W positions, T tokens. Both kinds are learnt on the frozen teacher before the
distillation (``token_learning.py``). The selected parts replace the teacher's own map, the teacher's losses train the
selection, and a Dice loss keeps the tokens apart. In the distillation the tokens are constants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError
from .losses import full_precision, mask_diversity_loss
from .wavelets import haar_levels, inverse_haar_levels

__all__ = ["SCALES", "FrequencyPrompts", "ReceptiveTokens", "TokenModule", "token_masks"]

INIT_STD = 0.01
SCALES = 3
"""The number of levels of FreeKD's transform."""


@full_precision
def token_masks(features: Tensor, tokens: Tensor) -> Tensor:
    """Compute m_t = sigmoid(token_t . F) at every position, in float32 at least.

    Args:
        features: (N, C, H, W).
        tokens: (T, C).

    Returns:
        (N, T, H, W), in (0, 1).
    """
    return torch.einsum("tc,nchw->nthw", tokens, features).sigmoid()


class TokenModule(nn.Module):
    """The tokens of one level.

    Args:
        channels: C of the teacher's map.
        num_tokens: T.

    Raises:
        ConfigError: ``num_tokens`` is below 1.
    """

    def __init__(self, channels: int, num_tokens: int) -> None:
        super().__init__()
        if num_tokens < 1:
            raise ConfigError("num_tokens", num_tokens, ">= 1")
        self.channels, self.num_tokens = channels, num_tokens

    def replace(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the replacement of the teacher's map (N, C, H, W), and the overlap of the masks, 0-d."""
        raise NotImplementedError


class ReceptiveTokens(TokenModule):
    """The tokens of MasKD: each gives a mask over positions, and a small network weighs the masks.

    Huang et al., "Masked Distillation with Receptive Tokens", ICLR 2023.

    Args:
        channels: C of the teacher's map.
        num_tokens: T; 6 for detection, 8 for segmentation.
        probability: weigh the tokens by the network Conv3x3, mean over positions, Conv1x1, softmax over tokens, as in
            detection. Without it every token has weight 1, as on logits.
    """

    def __init__(self, channels: int, *, num_tokens: int, probability: bool = True) -> None:
        super().__init__(channels, num_tokens)
        self.tokens = nn.Parameter(torch.randn(num_tokens, channels) * INIT_STD)
        self.probability: nn.Module | None = None
        if probability:
            convs = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, num_tokens, 1)
            for conv in convs:
                nn.init.normal_(conv.weight, std=math.sqrt(2 / (conv.kernel_size[0] ** 2 * conv.out_channels)))
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            self.probability = nn.Sequential(convs[0], nn.AdaptiveAvgPool2d(1), convs[1], nn.Flatten())

    def forward(self, features: Tensor) -> Tensor:
        """Compute the masks, (N, C, H, W) -> (N, T, H, W)."""
        return token_masks(features, self.tokens)

    @full_precision
    def weights(self, features: Tensor) -> Tensor:
        """Compute the weight of each token, (N, C, H, W) -> (N, T): of sum 1, or all 1 without the network."""
        if self.probability is None:
            return features.new_ones(len(features), self.num_tokens)
        counts: Tensor = self.probability(features)
        return counts.softmax(1)

    def replace(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return sum_t p_t m_t F, and the Dice overlap of the masks."""
        masks = self(features)
        kept = torch.einsum("nt,nthw->nhw", self.weights(features), masks).unsqueeze(1)
        return (kept * features).to(features.dtype), mask_diversity_loss(masks)


class FrequencyPrompts(TokenModule):
    """The prompts of FreeKD: tokens for each band of a Haar transform of three levels.

    Zhang et al., "FreeKD: Knowledge Distillation via Semantic Frequency Prompt", CVPR 2024. Band 0 is the low pass,
    bands 1 to 3 are the high passes, finest first. The masks of a high pass come from the sum over its three
    orientations.

    Args:
        channels: C of the teacher's map.
        num_tokens: T; 6.
    """

    def __init__(self, channels: int, *, num_tokens: int) -> None:
        super().__init__(channels, num_tokens)
        self.tokens = nn.Parameter(torch.randn(1 + SCALES, num_tokens, channels) * INIT_STD)

    def forward(self, features: Tensor) -> list[Tensor]:
        """Compute the masks of the bands, the low pass first: (N, C, H, W) -> (N, T, H_j, W_j) each."""
        return self.masks(*_bands(features))

    def masks(self, low: Tensor, highs: Sequence[Tensor]) -> list[Tensor]:
        """Compute the masks of a map that is transformed already."""
        bands = [low, *(high.sum(2) for high in highs)]
        return [token_masks(band, tokens) for band, tokens in zip(bands, self.tokens)]

    def replace(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the map made of sum_t m_t B for each band B, and the sum of the bands' Dice overlaps."""
        low, highs = _bands(features)
        masks = self.masks(low, highs)
        kept = [mask.sum(1, keepdim=True) for mask in masks]
        selected = [high * keep.unsqueeze(2) for high, keep in zip(highs, kept[1:])]
        replaced = inverse_haar_levels(low * kept[0], selected, features.shape[-2:])
        return replaced.to(features.dtype), torch.stack([mask_diversity_loss(mask) for mask in masks]).sum()


def _bands(features: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Transform a map in float32 at least, since the bands are sums of sums."""
    return haar_levels(features.to(torch.promote_types(features.dtype, torch.float32)), SCALES)
