"""A learned augmentation: a random affine map of the image whose mean and spread are trained against a student."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .losses import full_precision

__all__ = ["AffineAugmentor", "augmentor_objective"]

SPREAD = 0.1
"""The first deviation of the six numbers, as in sinzlab/orbit_transfer."""


class AffineAugmentor(nn.Module):
    r"""A spatial transformer whose 2x3 matrix is drawn anew for each image: theta = bias + std * eps, eps ~ N(0, 1).

    It has 12 parameters and sees no image. The bias starts at the identity, the deviation at 0.1. The machinery is that
    of sinzlab/orbit_transfer (MIT), of HARD's first author: bilinear sampling, zeros outside, ``align_corners`` False.
    Zeros are the mean colour where the images are normalised.

    With ``colour`` each of the three channels is multiplied by a drawn factor first, and a drawn number is added. These
    are six more of the numbers, with 12 more parameters. This part is ours.

    Args:
        colour: change the colours, too.
        rank, world: this process gets every ``world``-th of the draws for the images of all processes, which have
            equally many and the same random state.

    Example:
        >>> augmentor = AffineAugmentor()
        >>> augmentor(torch.rand(4, 3, 8, 8)).shape
        torch.Size([4, 3, 8, 8])
    """

    def __init__(self, *, colour: bool = False, rank: int = 0, world: int = 1) -> None:
        super().__init__()
        self.rank, self.world = rank, world
        start = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0] + ([1.0] * 3 + [0.0] * 3 if colour else [])
        self.bias = nn.Parameter(torch.tensor(start))
        self.std = nn.Parameter(torch.full((len(start),), SPREAD))

    def draw(self, count: int) -> Tensor:
        """Draw the standard normal numbers, (count, 6), or (count, 12) with colours."""
        return torch.randn(count, len(self.bias), device=self.bias.device)

    @full_precision
    def forward(self, images: Tensor) -> Tensor:
        """Transform images (N, C, H, W); with a deviation of 0 and the identity they stay as they are."""
        noise = self.draw(len(images) * self.world)[self.rank :: self.world]
        numbers = self.bias + self.std * noise
        if numbers.shape[1] > 6:
            factor, shift = numbers[:, 6:, None, None].chunk(2, 1)
            images = images * factor + shift
        grid = F.affine_grid(numbers[:, :6].reshape(-1, 2, 3), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)


def augmentor_objective(disagreement: Tensor, change: Tensor, lambda_teacher: float) -> Tensor:
    r"""Return what the augmentor maximises.

    .. math:: D(s(\tilde x), t(\tilde x)) - \lambda_t D(t(\tilde x), t(x))

    The second term keeps the images where the teacher still says what it said of the image itself. This form is a
    reconstruction from memory of the paper, which was not at hand.

    Args:
        disagreement: D of student and teacher on the augmented images.
        change: D of the teacher on the augmented images and on the images themselves.
        lambda_teacher: its weight.
    """
    return disagreement - lambda_teacher * change
