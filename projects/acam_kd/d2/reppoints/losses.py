"""The losses of RepPoints, as sums over a batch, in float32 at least."""

from __future__ import annotations

from fvcore.nn import sigmoid_focal_loss
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

__all__ = ["box_loss", "class_loss"]


def class_loss(logits: Tensor, labels: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Compute the sum of the focal losses of all classes and cells.

    Args:
        logits: (N, R, K).
        labels: (N, R), the class; K for background, negative to leave a cell out.
        alpha, gamma: see ``fvcore.nn.sigmoid_focal_loss``.

    Returns:
        0-d.
    """
    kept, classes = labels >= 0, logits.shape[2]
    wanted = F.one_hot(labels[kept], classes + 1)[:, :classes]
    kept_logits = logits[kept].float()
    return sigmoid_focal_loss(kept_logits, wanted.to(kept_logits), alpha=alpha, gamma=gamma, reduction="sum")


def box_loss(boxes: Tensor, wanted: Tensor, positive: Tensor, sizes: Tensor, *, beta: float = 0.11) -> Tensor:
    """Compute the sum of the smooth L1 losses of the corners of all positive cells.

    Args:
        boxes, wanted: (N, R, 4).
        positive: (N, R), bool.
        sizes: (R,), the lengths that differences are measured in.
        beta: the difference from which on the loss is linear.

    Returns:
        0-d, with a graph even if no cell is positive.
    """
    units = sizes.expand(positive.shape)[positive][:, None]
    return F.smooth_l1_loss(boxes[positive] / units, wanted[positive] / units, beta=beta, reduction="sum")
