"""The criterion of torchvision's segmentation models, which themselves return logits only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ..data.labels import IGNORED

__all__ = ["Segmentor"]


class Segmentor(nn.Module):
    """A segmentation model with the interface of torchvision's detectors.

    In training ``model(images, targets)`` returns a dict of losses, as in torchvision's recipe. They are the
    pixels' cross-entropy, and 0.5 times that of the auxiliary head where there is one. In evaluation
    ``model(images)`` returns per image ``{"semantic": (H, W) labels}`` of its own size. Images are resized inside, and
    padded to one batch.

    Args:
        network: returns ``{"out": (N, K, H, W) logits, "aux": ...}``; its state alone is saved.
        size: the shorter side that images are resized to; None for no resizing.
    """

    def __init__(self, network: nn.Module, *, size: int | None = None) -> None:
        super().__init__()
        self.network, self.size = network, size
        self.image_mean, self.image_std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

    @property
    def backbone(self) -> nn.Module:
        """The network's backbone."""
        return self.network.backbone  # type: ignore[return-value]

    def batch(self, images: Sequence[Tensor]) -> Tensor:
        """Make one batch, (N, 3, H, W), of (3, H, W) images in [0, 1]: resize, normalise, pad with the mean colour."""
        mean, std = (images[0].new_tensor(x).view(3, 1, 1) for x in (self.image_mean, self.image_std))
        return _pad([(self._resized(image, "bilinear") - mean) / std for image in images], 0)

    def labels(self, targets: Sequence[dict[str, Tensor]]) -> Tensor:
        """Make one batch, (N, H, W), of ``{"semantic": (H, W)}`` each: resize and pad, as ``batch`` does."""
        resized = [self._resized(target["semantic"][None].float(), "nearest")[0].long() for target in targets]
        return _pad(resized, IGNORED)

    def _resized(self, x: Tensor, mode: str) -> Tensor:
        """Resize (K, H, W) so that the shorter side is ``size``."""
        if self.size is None or min(x.shape[1:]) == self.size:
            return x
        shape = [round(side * self.size / min(x.shape[1:])) for side in x.shape[1:]]
        how = {"antialias": True, "align_corners": False} if mode == "bilinear" else {}
        return F.interpolate(x[None], shape, mode=mode, **how)[0]  # type: ignore[arg-type]

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return losses in training, labels in evaluation.

        Args:
            images: (3, H, W) each, in [0, 1].
            targets: ``{"semantic": (H, W) labels}`` each; needed in training. An image without any label that
                counts gives a loss of zero.

        Raises:
            ValueError: there are no targets in training.
        """
        if not self.training:  # image by image, because padding would change poolings over the whole image
            return [{"semantic": self._labels(self.network(self.batch([i]))["out"][0], i)} for i in images]
        out = self.network(self.batch(images))
        if targets is None:
            raise ValueError("targets are needed in training")
        labels = self.labels(targets)
        losses = {"loss_segmentation": _cross_entropy(out["out"], labels)}
        if "aux" in out:
            losses["loss_auxiliary"] = 0.5 * _cross_entropy(out["aux"], labels)
        return losses

    def _labels(self, logits: Tensor, image: Tensor) -> Tensor:
        """Predict labels, (H, W) of the image, from logits (K, H', W')."""
        if logits.shape[1:] != image.shape[1:]:
            logits = F.interpolate(logits[None], image.shape[1:], mode="bilinear", align_corners=False)[0]
        return logits.argmax(0)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def _pad(tensors: Sequence[Tensor], value: float) -> Tensor:
    height, width = (max(x.shape[d] for x in tensors) for d in (-2, -1))
    return torch.stack([F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), value=value) for x in tensors])
