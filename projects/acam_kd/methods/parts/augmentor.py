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

    Example:
        >>> augmentor = AffineAugmentor()
        >>> augmentor(torch.rand(4, 3, 8, 8)).shape
        torch.Size([4, 3, 8, 8])
    """

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]))
        self.std = nn.Parameter(torch.full((6,), SPREAD))

    def draw(self, count: int) -> Tensor:
        """Draw the standard normal numbers, (count, 6)."""
        return torch.randn(count, 6, device=self.bias.device)

    @full_precision
    def forward(self, images: Tensor) -> Tensor:
        """Transform images (N, C, H, W); with a deviation of 0 and the identity they stay as they are."""
        theta = (self.bias + self.std * self.draw(len(images))).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
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
