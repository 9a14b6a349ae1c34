"""The comparison of an exported file with the model in torch, detection by detection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Agreement", "compare"]

Output = Mapping[str, Tensor]

LOWEST = 0.05
"""Detections below this score are not compared."""
SCORE, PIXELS = 1e-3, 0.1
"""The largest difference of a score, and of a box's corner in pixels, between two detections that match."""
MASKS = 0.99
"""The smallest intersection over union of two masks that match."""
MATCHED = 0.99
"""The smallest part of the detections that has to match: rounding may decide between two boxes that overlap."""
SAME_LABELS = 0.999
"""The smallest part of the pixels that has to have the same label."""


@dataclass(frozen=True)
class Agreement:
    """The result of a comparison on one image.

    Args:
        compared: number of detections of both models, of pixels, or of classes.
        agreeing: those of them that agree.
        kind: the name of what was compared.
    """

    compared: int
    agreeing: int
    kind: str = "detections"

    def __bool__(self) -> bool:
        return self.agreeing >= (SAME_LABELS if self.kind == "pixels" else MATCHED) * self.compared

    def __str__(self) -> str:
        return f"{self.agreeing} of {self.compared} {self.kind} agree"


def compare(reference: Output, other: Output) -> Agreement:
    """Compare two outputs for one image.

    Args:
        reference, other: ``{"semantic": (H, W)}``, or a classifier's ``{"scores": (K,)}``, or ``boxes`` (K, 4),
            ``scores`` (K,), ``labels`` (K,) and perhaps ``masks`` (K, 1, H, W).

    Example:
        >>> import torch
        >>> one = {"boxes": torch.tensor([[0.0, 0, 9, 9]]), "scores": torch.tensor([0.9]), "labels": torch.tensor([1])}
        >>> print(compare(one, one), "and", compare(one, {**one, "labels": torch.tensor([2])}))
        2 of 2 detections agree and 0 of 2 detections agree
    """
    if "semantic" in reference:
        if reference["semantic"].shape != other["semantic"].shape:
            return Agreement(reference["semantic"].numel(), 0, "pixels")
        same = reference["semantic"] == other["semantic"]
        return Agreement(same.numel(), int(same.sum()), "pixels")
    if "boxes" not in reference:
        same = (reference["scores"] - other["scores"]).abs() <= SCORE
        return Agreement(same.numel(), int(same.sum()), "classes")
    pairs = _alike(reference, other)
    # One at the threshold may be missing in the other.
    found = [output["scores"] >= LOWEST + SCORE for output in (reference, other)]
    matched = [(pairs.any(1) & found[0]).sum(), (pairs.any(0) & found[1]).sum()]
    return Agreement(int(sum(f.sum() for f in found)), int(sum(matched)))


def _alike(a: Output, b: Output) -> Tensor:
    """Return for each detection of ``a`` and each of ``b`` if they are the same, (K, L)."""
    same = a["labels"].long()[:, None] == b["labels"].long()
    same &= (a["scores"][:, None] - b["scores"]).abs() <= SCORE
    same &= ((a["boxes"][:, None] - b["boxes"]).abs() <= PIXELS).all(2)
    if "masks" in a:
        for i, j in same.nonzero().tolist():
            first, second = a["masks"][i] > 0.5, b["masks"][j] > 0.5
            union = int((first | second).sum())
            same[i, j] = union == 0 or int((first & second).sum()) >= MASKS * union
    return same
