"""Mixup and CutMix: images of a batch are blended with others of it, and so are their labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from ..core import ConfigError, read_methods
from .classification import Classifier
from .run import Settings

__all__ = ["Mixing", "build_mixing"]

HARD_LABELS = {
    "USKD": "its target is one class here",
    "PSKD": "a mixed image has no past prediction of its own",
    "MCMI": "a mixed image is in no class",
    "DKD": "it divides the classes into the target and the others",
}
"""The methods that are not defined on mixed labels -> the reason."""


class Mixing:
    """torchvision's Mixup, CutMix, or one of the two at random for each batch.

    Args:
        model: makes the squares that are mixed.
        num_classes: K.
        mixup, cutmix: alpha of the Beta distribution of the shares; 0 for neither.

    Example:
        >>> from acam_kd.tv.cifar_nets import build_cifar_net
        >>> mixing = Mixing(Classifier(build_cifar_net("resnet8", 3), size=8), 3, mixup=1.0)
        >>> images, targets = mixing([torch.rand(3, 8, 8), torch.rand(3, 8, 8)], [{"label": 0}, {"label": 2}])
        >>> float(targets[0]["scores"].sum())
        1.0
    """

    def __init__(self, model: Classifier, num_classes: int, *, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        self.model = model
        kinds: list[nn.Module] = [v2.MixUp(alpha=mixup, num_classes=num_classes)] if mixup else []
        kinds += [v2.CutMix(alpha=cutmix, num_classes=num_classes)] if cutmix else []
        self.kinds = kinds

    def __call__(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Any]]
    ) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """Mix a batch.

        Args:
            images: (3, H, W) each, in [0, 1].
            targets: ``{"label", ...}`` each.

        Returns:
            Square images, and targets that have the shares of the classes besides, ``{"scores": (K,)}``. Their
            ``"label"`` is the class with the largest share.
        """
        kind = self.kinds[int(torch.randint(len(self.kinds), ()))] if len(self.kinds) > 1 else self.kinds[0]
        labels = torch.tensor([target["label"] for target in targets], device=images[0].device)
        mixed, shares = kind(self.model.squares(images), labels)
        found = zip(targets, shares, shares.argmax(1).tolist())
        return list(mixed), [{**target, "scores": share, "label": label} for target, share, label in found]


def build_mixing(settings: Settings, student: nn.Module, num_classes: int) -> Mixing | None:
    """Return what mixes the batches of a run; None for nothing.

    Args:
        settings: of the run.
        student: its model.
        num_classes: K.

    Raises:
        ConfigError: the model is no classifier, or a method is not defined on mixed labels.
    """
    name = "mixup" if settings.mixup else "cutmix"
    if not (settings.mixup or settings.cutmix):
        return None
    if not isinstance(student, Classifier):
        raise ConfigError(name, f"{getattr(settings, name)} for {settings.student}", "a classifier")
    for method in read_methods(settings.method):
        if method in HARD_LABELS:
            raise ConfigError(name, f"mixed labels for {method}", "one class for each image", HARD_LABELS[method])
    return Mixing(student, num_classes, mixup=settings.mixup, cutmix=settings.cutmix)
