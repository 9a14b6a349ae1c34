"""The frozen teacher, and how its images are made from the student's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .features import Features

__all__ = ["Extract", "FrozenTeacher", "PRECISIONS", "PixelTransform"]

PRECISIONS = ("", "float32", "float16", "bfloat16")
"""What the teacher may run in; the first is that of the student's step, whatever that is."""

Extract = Callable[..., Features]
"""Network and normalised batch (N, C, H, W), and, of a detector whose class head is distilled, the regions that it is
asked about -> its features. A function, not a method: it must not hold a network."""


def call(network: nn.Module, batch: Tensor) -> Features:
    """What the network itself returns."""
    return network(batch)  # type: ignore[no-any-return]


class PixelTransform(nn.Module):
    """Turns a batch normalised for the student into the same batch normalised for the teacher.

    With identical statistics and channel order the batch passes through untouched, bit for bit.
    Padding, which is 0 for the student, is the student's mean colour, and becomes whatever that
    colour is to the teacher: 0 whenever the two mean colours agree.

    Args:
        student_mean, student_std: per channel, in the student's channel order.
        teacher_mean, teacher_std: per channel, in the teacher's channel order.
        reverse_channels: the two orders are each other's reverse (BGR and RGB).
    """

    def __init__(
        self,
        *,
        student_mean: Sequence[float],
        student_std: Sequence[float],
        teacher_mean: Sequence[float],
        teacher_std: Sequence[float],
        reverse_channels: bool = False,
    ) -> None:
        super().__init__()
        step = -1 if reverse_channels else 1
        mean_s, std_s = list(student_mean)[::step], list(student_std)[::step]
        scale = [s / t for s, t in zip(std_s, teacher_std)]
        shift = [(s - t) / std for s, t, std in zip(mean_s, teacher_mean, teacher_std)]
        self.reverse_channels = reverse_channels
        self.identity = not reverse_channels and set(scale) == {1} and set(shift) == {0}
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


class FrozenTeacher:
    """The teacher's feature extractor: always in eval mode, never trained, never saved.

    On purpose this is not an ``nn.Module``. As a submodule of the model that is trained, the teacher would
    be flipped to training mode by ``.train()`` (its batch-norm statistics then move), be handed to the
    optimizer by ``parameters()``, more than double every checkpoint, and make stock ImageNet weights
    fail to load, because two of its keys would match each of theirs. The price is that it must be told to
    follow ``.to(device)``: ``DistillationModel`` forwards that through ``_apply``.

    Args:
        network: its backbone, or as much of it as ``extract`` needs. It is frozen in place.
        transform: applied to the student's batch first.
        extract: what makes ``Features`` of network and batch, (N, C, H, W); calling the network, if left out.
        precision: one of ``PRECISIONS``, by autocast: the weights stay as they are, since batch normalisation needs
            them so (a variance may be too large for float16) and a backbone's are small beside its maps.
        compiled: its backbone by torch.compile, once for all sizes of images; heads that ``extract`` runs are not.

    Raises:
        ValueError: an unknown precision.
    """

    def __init__(
        self,
        network: nn.Module,
        transform: PixelTransform | None = None,
        extract: Extract = call,
        *,
        precision: str = "",
        compiled: bool = False,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(
                f"the teacher's precision must be empty, for the student's, or one of {', '.join(PRECISIONS[1:])}, "
                f"not {precision!r} (key: DISTILL.TEACHER.PRECISION)"
            )
        self.network = network.eval().requires_grad_(False)
        self.transform, self.extract = transform, extract
        self.precision, self.compiled = precision, compiled
        if compiled:  # in place: nothing changes its name, and a deep copy or a pickle is not compiled
            getattr(network, "backbone", network).compile(dynamic=True)

    @torch.no_grad()
    def __call__(self, batch: Tensor, *regions: Any) -> Features:
        """The teacher's features of the very batch that the student's backbone received.

        Raises:
            ValueError: it cannot be compiled here.
        """
        if self.transform is not None:
            batch = self.transform(batch)
        with self._autocast(batch.device.type):
            if not self.compiled:
                return self.extract(self.network, batch, *regions)
            return self._extract_compiled(batch, *regions)

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
            reason = (str(getattr(error, "inner_exception", error)).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"the teacher cannot be compiled here: {reason} (key: DISTILL.TEACHER.COMPILE)") from error

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.network._apply(fn)  # type: ignore[no-untyped-call]
        if self.transform is not None:
            self.transform._apply(fn)  # type: ignore[no-untyped-call]
