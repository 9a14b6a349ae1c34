"""The frozen teacher, and how its images are made from the student's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError, first_line
from .features import Features

__all__ = ["Extract", "FrozenTeacher", "NoTeacher", "PRECISIONS", "PixelTransform", "Pixels", "evaluating"]

PRECISIONS = ("", "float32", "float16", "bfloat16")
"""The precisions of the teacher; the empty one is that of the student's step."""

Extract = Callable[..., Features]
"""Network and normalised batch (N, C, H, W), and, of a detector whose class head is distilled, the regions to predict
for -> the network's features. A function, not a method: it must not hold a network."""


def call(network: nn.Module, batch: Tensor) -> Features:
    """Return what the network itself returns."""
    return network(batch)  # type: ignore[no-any-return]


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Run a network in evaluation mode, and give every submodule its own mode back afterwards."""
    training = [module for module in network.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class Pixels:
    """The normalisation of a model's images.

    Args:
        mean, std: per channel, in the model's channel order.
        order: ``"RGB"``, ``"BGR"`` or another name; empty if it is not known. It counts for three channels only.
        white: the value of a white pixel before the normalisation, 255 or 1; 0 for the same as the other model's.

    Example:
        >>> student = Pixels([127.5] * 3, [255.0] * 3, "RGB", white=255.0)
        >>> teacher = Pixels([0.5] * 3, [0.5] * 3, "RGB", white=1.0)
        >>> white = torch.full((1, 3, 1, 1), 0.5)  # as the student has it
        >>> PixelTransform(student, teacher)(white).flatten().tolist()
        [1.0, 1.0, 1.0]
    """

    mean: Sequence[float]
    std: Sequence[float]
    order: str = ""
    white: float = 0.0


class PixelTransform(nn.Module):
    """Turns a batch normalised for the student into the same batch normalised for the teacher.

    With identical statistics and channel order the batch passes through untouched, bit for bit. Padding is 0 for the
    student, which is the student's mean colour. It becomes whatever that colour is to the teacher: 0 whenever the two
    mean colours agree. A grey image is repeated for a teacher of several channels.

    Args:
        student, teacher: how the two normalise.

    Raises:
        ConfigError: their channels do not correspond.

    Example:
        >>> rgb = Pixels([123.7, 116.3, 103.5], [58.4, 57.1, 57.4], "RGB")
        >>> bgr = Pixels([103.5, 116.3, 123.7], [1.0, 1.0, 1.0], "BGR")
        >>> PixelTransform(bgr, rgb)(torch.zeros(1, 3, 2, 2)).abs().max()  # the mean colour stays the mean colour
        tensor(0.)
    """

    def __init__(self, student: Pixels, teacher: Pixels) -> None:
        super().__init__()
        channels = len(student.mean), len(teacher.mean)
        if channels[0] not in (1, channels[1]):
            raise ConfigError(
                "teacher", f"{channels[1]} channels of the image", f"the student's {channels[0]}",
                "choose a teacher that was trained on images like the student's",
            )  # fmt: skip
        orders = {student.order, teacher.order}
        self.reverse_channels = channels == (3, 3) and "" not in orders and len(orders) == 2
        if self.reverse_channels and orders != {"BGR", "RGB"}:
            raise ConfigError(
                "teacher", f"images in {teacher.order}", f"the student's {student.order}",
                "only RGB and BGR are turned into each other",
            )  # fmt: skip
        unit = teacher.white / student.white if teacher.white and student.white else 1.0
        step = -1 if self.reverse_channels else 1
        mean_s, std_s = (list(x)[::step] * (channels[1] // channels[0]) for x in (student.mean, student.std))
        scale = [unit * s / t for s, t in zip(std_s, teacher.std)]
        shift = [(unit * s - t) / std for s, t, std in zip(mean_s, teacher.mean, teacher.std)]
        self.identity = (
            channels[0] == channels[1] and not self.reverse_channels and {*scale, 1} == {1} and {*shift, 0} == {0}
        )
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", torch.tensor(scale).view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift).view(-1, 1, 1), persistent=False)

    def forward(self, batch: Tensor) -> Tensor:
        """(N, C, H, W) for the student -> (N, C, H, W) for the teacher."""
        if self.identity:
            return batch
        if self.reverse_channels:
            batch = batch.flip(1)
        return batch * self.scale + self.shift


def _tensors(part: nn.Module | None) -> Iterator[Tensor]:
    return iter(()) if part is None else chain(part.parameters(), part.buffers())


class FrozenTeacher:
    """The teacher's feature extractor: it runs in evaluation mode, without gradients, and is never saved.

    It is no ``nn.Module``. As a submodule of the student the teacher would be flipped to training mode by ``.train()``
    (its batch-norm statistics then move), be handed to the optimizer by ``parameters()``, more than double every
    checkpoint, and make ImageNet weights fail to load, because two of its keys would match each of theirs.

    No flag of the network is written: each call sets evaluation mode and restores it, so two students may share one
    teacher. Copies of a student share it too; the network moves to the device of the batch, and keeps its data type.

    Args:
        network: its backbone, or as much of it as ``extract`` needs.
        pixels: applied to the student's batch first.
        extract: makes ``Features`` of network and batch, (N, C, H, W); calling the network, if left out.
        precision: one of ``PRECISIONS``, by autocast: the weights stay as they are, since batch normalisation needs
            them so (a variance may be too large for float16) and a backbone's are small beside its maps.
        compiled: its backbone by torch.compile, once for all sizes of images; heads that ``extract`` runs are not.

    Raises:
        ConfigError: an unknown precision.
    """

    def __init__(
        self,
        network: nn.Module,
        pixels: PixelTransform | None = None,
        extract: Extract = call,
        *,
        precision: str = "",
        compiled: bool = False,
    ) -> None:
        if precision not in PRECISIONS:
            allowed = f"one of {', '.join(PRECISIONS[1:])}, or empty for the student's"
            raise ConfigError("teacher_precision", precision, allowed)
        self.network, self.pixels, self.extract = network, pixels, extract
        self.precision, self.compiled = precision, compiled
        if compiled:  # in place: nothing changes its name, and a deep copy or a pickle is not compiled
            getattr(network, "backbone", network).compile(dynamic=True)

    @torch.no_grad()
    def __call__(self, batch: Tensor, *regions: Any) -> Features:
        """Return the teacher's features of the very batch that the student's backbone received.

        Raises:
            ConfigError: it cannot be compiled here.
        """
        dtype = self._follow(batch.device)
        if self.pixels is not None:
            batch = self.pixels(batch)
        with self._autocast(batch.device.type), evaluating(self.network):
            device = batch.device.type
            autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
            if batch.is_floating_point() and not autocast:
                batch = batch.to(dtype)
            if not self.compiled:
                return self.extract(self.network, batch, *regions)
            return self._extract_compiled(batch, *regions)

    def _follow(self, device: torch.device) -> torch.dtype | None:
        """Move to the device of the batch, and return the network's own data type, which stays."""
        dtype = None
        for part in [self.pixels, self.network]:
            first = next((x for x in _tensors(part) if x.is_floating_point()), None)
            if first is not None and part is not None:
                dtype = first.dtype
                if first.device != device:
                    part.to(device)
        return dtype

    def _autocast(self, device: str) -> AbstractContextManager[Any]:
        if not self.precision:
            return nullcontext()
        if self.precision == "float32":
            return torch.autocast(device, enabled=False)
        return torch.autocast(device, dtype=getattr(torch, self.precision))

    def _extract_compiled(self, batch: Tensor, *regions: Any) -> Features:
        from torch._dynamo.exc import TorchDynamoException  # it takes long to import

        try:
            return self.extract(self.network, batch, *regions)
        except TorchDynamoException as error:
            reason = first_line(getattr(error, "inner_exception", error))
            raise ConfigError("teacher_compile", True, "False", f"it cannot be compiled here: {reason}") from error

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher:
        """Return the very teacher: copies of a student share it."""
        return self


class NoTeacher(FrozenTeacher):
    """The place of the teacher for methods that learn from the student alone; they get its own maps, detached."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
