"""AT: attention transfer."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..core.distiller import NOTHING_KNOWN, Distiller, check_weights
from ..core.features import Channels, Features
from ..core.registry import DISTILLER_REGISTRY
from ..core.targets import Targets
from .parts.losses import check_shapes, full_precision
from .recipes import RECIPES

__all__ = ["AT", "attention_transfer"]


@full_precision
def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compute the mean squared error between the attention maps of student and teacher.

    .. math:: L = \frac{1}{NHW} \sum_n \lVert A(S_n) - A(T_n) \rVert^2, \qquad
              A(F) = \frac{\text{mean}_c F_c^2}{\lVert \text{mean}_c F_c^2 \rVert_2}

    A is normalised over the H x W positions of one image, so scaling a map changes nothing. The number of channels is
    free. The norm of A is 1, so L is of the order of 1 / HW at most.

    Args:
        student, teacher: (N, C, H, W); C may differ.

    Raises:
        ValueError: the images or positions differ in number.
    """
    student, teacher = (x.square().mean(1) for x in (student, teacher))  # (N, H, W)
    check_shapes(student, teacher)
    student, teacher = (F.normalize(x.flatten(1), dim=1) for x in (student, teacher))
    return (student - teacher).square().sum() / max(student.numel(), 1)


@DISTILLER_REGISTRY.register()
class AT(Distiller):
    """Attention transfer: a comparison of where the energy of the features lies, summed over levels.

    Zagoruyko & Komodakis, "Paying More Attention to Attention: Improving the Performance of Convolutional Neural
    Networks via Attention Transfer", ICLR 2017, in the form of their code:

        L = alpha mean (A(F_S) - A(F_T))^2,    A(F) = normalised over positions (mean_c F^2)

    There is nothing to train. Student and teacher may differ in their numbers of channels.

    Recommended: alpha = 1000 in classification (the default; the authors), 10000 on the last features of a
    segmentor (CIRKD). The mean over positions makes the values small, hence the large weights. No weight is known for
    detectors.

    Args:
        student_channels, teacher_channels: the levels to distil.
        alpha: weight.

    Raises:
        ConfigError: the weight is out of range.

    Example:
        >>> import torch
        >>> method = AT(student_channels={"p3": 16}, teacher_channels={"p3": 24}, alpha=1000.0)
        >>> losses = method({"p3": torch.rand(2, 16, 12, 20)}, {"p3": torch.rand(2, 24, 12, 20)})
        >>> sorted(losses)
        ['loss_at_attention']
    """

    recipes = RECIPES["AT"]

    def __init__(self, student_channels: Channels, teacher_channels: Channels, *, alpha: float = 1000.0) -> None:
        super().__init__(student_channels, teacher_channels)
        check_weights(alpha=alpha)
        self.alpha = alpha

    def forward(self, student: Features, teacher: Features, targets: Targets = NOTHING_KNOWN) -> dict[str, Tensor]:
        """Return ``loss_at_attention``."""
        errors = {level: attention_transfer(student[level], teacher[level].detach()) for level in self.levels}
        self._step = {level: error.detach() for level, error in errors.items()}
        return {"loss_at_attention": self.alpha * sum(errors.values())}  # type: ignore[dict-item]

    def metrics(self) -> dict[str, Tensor]:
        """Return ``<level>/attention``, unweighted."""
        return {f"{level}/attention": error for level, error in self._step.items()}
