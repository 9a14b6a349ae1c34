"""Batch norms that are frozen, and free again, torchvision's and timm's; and norms of a single value."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from ..core.errors import RunError

__all__ = ["SingleValueGroupNorm", "convert_norms", "enough_values", "is_frozen", "is_norm", "quicken"]


class SingleValueGroupNorm(nn.GroupNorm):
    """A group norm that also takes a map of one pixel where each group has one channel; the result is its bias.

    torch's own refuses such a map of one image, and takes that of two. The tensors are those of torch's own.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise a map, (N, C, H, W)."""
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps, torch.backends.cudnn.enabled)


@contextmanager
def enough_values(when: str) -> Iterator[None]:
    """Turn torch's error about a batch norm that gets one value per channel into one line.

    Args:
        when: said in the message, as "iteration 7".

    Raises:
        RunError: instead of that error.
    """
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel"):
            raise
        what = "a batch norm gets one image, whose map has one pixel"
        raise RunError(what, when, "raise {batch_size} to 2 images a device, or raise {size}") from error


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a batch norm, frozen or not."""
    return isinstance(module, nn.BatchNorm2d) or is_frozen(module)


def is_frozen(module: nn.Module) -> bool:
    """Return whether a module is a batch norm whose statistics stay as they are."""
    layers = _timm_layers()
    return isinstance(module, (FrozenBatchNorm2d, *([layers.FrozenBatchNormAct2d] if layers else [])))


def _timm_layers() -> Any:
    """Return timm's layers if a model of timm can be there."""
    return sys.modules.get("timm.layers")


def convert_norms(part: nn.Module, *, frozen: bool) -> nn.Module:
    """Return a part with each batch norm frozen, or free, with its values.

    Args:
        part: changed in place, or replaced where it is a norm itself.
        frozen: the kind of norm that is wanted.
    """
    if is_norm(part):
        return part if is_frozen(part) == frozen else _other(part)
    for name, child in part.named_children():
        part.add_module(name, convert_norms(child, frozen=frozen))
    return part


def quicken(model: nn.Module) -> None:
    """Set the momentum of all running statistics to torch's default.

    MobileNetV3's own and that of some networks of timm, 0.01, is for pretrained weights and long runs. From a random
    start its statistics lag behind, and in evaluation the model then predicts one class even after hundreds of steps.
    For weights from a file the default does no harm. The momentum is not in the state.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1


def _other(norm: Any) -> nn.Module:
    """Return a frozen norm for one that learns, and the other way round."""
    layers = _timm_layers()
    if layers and isinstance(norm, (layers.BatchNormAct2d, layers.FrozenBatchNormAct2d)):
        free = isinstance(norm, layers.BatchNormAct2d)
        made: nn.Module = (layers.freeze_batch_norm_2d if free else layers.unfreeze_batch_norm_2d)(norm)
        return made.to(norm.weight.device).train(norm.training)
    if isinstance(norm, FrozenBatchNorm2d):
        made = nn.BatchNorm2d(len(norm.weight), eps=norm.eps)
    else:
        made = FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
    values = {name: value for name, value in norm.state_dict().items() if name in made.state_dict()}
    made.load_state_dict({**made.state_dict(), **values})
    return made.to(norm.weight.device).train(norm.training)
