"""The criterion of classifiers, which themselves return logits only, and the sizes of their images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cifar_nets import CIFAR_NETS

__all__ = ["CROPPED_FROM", "SMALL", "Classifier", "resize_shorter", "usual_size"]

SMALL = 128
"""The side below which an image is resized whole, and not to 256/224 of the side that is cut out."""
CROPPED_FROM = 256 / 224
SIZES = {"inception_v3": 299, "efficientnet_b1": 240}


def usual_size(name: str) -> int:
    """Return the side of the images of a model where no other is asked for.

    Example:
        >>> usual_size("resnet20"), usual_size("resnet18")
        (32, 224)
    """
    return 32 if name in CIFAR_NETS else SIZES.get(name, 224)


def resize_shorter(image: Tensor, side: int) -> Tensor:
    """Resize (C, H, W) so that the shorter side is ``side``."""
    shorter = min(image.shape[1:])
    if shorter == side:
        return image
    shape = [max(1, round(length * side / shorter)) for length in image.shape[1:]]
    return F.interpolate(image[None], shape, mode="bilinear", antialias=True, align_corners=False)[0]


class Classifier(nn.Module):
    """A classifier with the interface of torchvision's detectors.

    In training ``model(images, targets)`` returns ``{"loss_classification"}``, the cross-entropy. In evaluation
    ``model(images)`` returns per image ``{"scores": (K,)}``, the softmax. Images of another size than ``size`` are
    resized by their shorter side, and their centre is cut out: of 256/224 of the size from 128 pixels on.

    Args:
        network: returns logits (N, K), or a tuple that begins with them; its state alone is saved.
        size: the side of the square images that the network gets.

    Example:
        >>> from acam_kd.tv.cifar_nets import build_cifar_net
        >>> model = Classifier(build_cifar_net("resnet8", 10), size=32).eval()
        >>> model([torch.rand(3, 40, 50)])[0]["scores"].shape
        torch.Size([10])
    """

    def __init__(self, network: nn.Module, *, size: int) -> None:
        super().__init__()
        self.network, self.size = network, size
        self.image_mean, self.image_std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

    def batch(self, images: Sequence[Tensor]) -> Tensor:
        """Make one batch, (N, 3, size, size), of (3, H, W) images in [0, 1]: resize, cut out, normalise."""
        mean, std = (images[0].new_tensor(x).view(3, 1, 1) for x in (self.image_mean, self.image_std))
        return (self.squares(images) - mean) / std

    def squares(self, images: Sequence[Tensor]) -> Tensor:
        """Resize (3, H, W) images and cut their centres out, (N, 3, size, size)."""
        return torch.stack([self._square(image) for image in images])

    def _square(self, image: Tensor) -> Tensor:
        size = self.size
        if image.shape[1:] == (size, size):
            return image
        image = resize_shorter(image, size if size < SMALL else round(size * CROPPED_FROM))
        top, left = ((length - size) // 2 for length in image.shape[1:])
        return image[:, top : top + size, left : left + size]

    def labels(self, targets: Sequence[dict[str, Any]]) -> Tensor:
        """Make the labels of a batch, (N,), of ``{"label": number}`` each."""
        device = next(self.network.parameters()).device
        return torch.tensor([target["label"] for target in targets], device=device)

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Any]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return losses in training, scores in evaluation.

        Args:
            images: (3, H, W) each, in [0, 1].
            targets: ``{"label": number}`` each, needed in training; of a mixed image with the shares of its classes,
                ``{"scores": (K,)}``.

        Raises:
            ValueError: there are no targets in training.
        """
        output = self.network(self.batch(images))
        logits = (output if isinstance(output, Tensor) else output[0]).float()
        if not self.training:
            return [{"scores": scores} for scores in logits.softmax(1)]
        if targets is None:
            raise ValueError("targets are needed in training")
        mixed = [target["scores"] for target in targets if "scores" in target]
        truth = torch.stack(mixed).to(logits) if mixed else self.labels(targets)
        return {"loss_classification": F.cross_entropy(logits, truth)}
