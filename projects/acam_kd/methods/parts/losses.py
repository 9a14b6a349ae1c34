"""The losses of ACAM-KD as pure functions of tensors, and helpers that the losses of all methods share.

Letters: N images, C channels, H x W positions, M masks. Every loss computes in float32 at least (float64 stays
float64), also under autocast. It returns a 0-d tensor with a graph, also for N = 0.

Paper: Lan & Tian, "ACAM-KD: Adaptive and Cooperative Attention Masking for Knowledge Distillation",
ICCV 2025, arXiv 2503.06307. The masked errors are normalised as in MasKD (ICLR 2023), whose formula they share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...core.errors import ConfigError

__all__ = [
    "check_form",
    "check_shapes",
    "check_temperature",
    "full_precision",
    "mask_diversity_loss",
    "masked_mse",
    "mse",
    "spatial_masked_mse",
    "squared_error",
]

Result = TypeVar("Result")
EPS = 1e-6
"""The number added to every sum of a mask: without it a vanished mask would divide by zero."""
FORMS = ("pairwise", "ratio", "decorrelated")
"""The forms of the diversity loss."""
CONTRAST = 0.25
"""The standard deviation of a mask from which the decorrelated form asks for no more; that of zeros and ones is 0.5."""
CORRELATION_EPS, VARIANCE_EPS = 1e-8, 1e-8
"""Added to a product of two variances, and to a variance under its root: for masks that are constant."""


def full_precision(loss: Callable[..., Result]) -> Callable[..., Result]:
    """Cast the tensors to their common type, float32 at least, and switch autocast off inside.

    Any other argument, such as a temperature or a tensor of labels, passes unchanged.
    """

    def cast(x: Any, dtype: torch.dtype) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    @wraps(loss)
    def wrapper(*args: Any, **named: Any) -> Result:
        dtype, device = torch.float32, "cpu"
        for x in (*args, *named.values()):
            if isinstance(x, Tensor) and x.is_floating_point():
                dtype, device = torch.promote_types(dtype, x.dtype), x.device.type
        with torch.autocast(device_type=device, enabled=False):
            return loss(*(cast(x, dtype) for x in args), **{name: cast(x, dtype) for name, x in named.items()})

    return wrapper


def check_shapes(
    student: Tensor, teacher: Tensor, masks: Tensor | None = None, masked_dims: tuple[int, ...] = ()
) -> None:
    """Raise ValueError for features that differ in shape, and for masks other than (N, M, the ``masked_dims``)."""
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape")
    if masks is not None:
        expected = tuple(student.shape[dim] for dim in masked_dims)
        found = (masks.shape[0], *masks.shape[2:])
        if found != expected:
            raise ValueError(f"masks {tuple(masks.shape)} do not fit features {tuple(student.shape)}")


def check_form(form: str, argument: str = "form") -> None:
    """Raise ConfigError for an unknown form of the diversity loss, which ``argument`` gave."""
    if form not in FORMS:
        raise ConfigError(argument, form, f"one of {', '.join(FORMS)}")


def check_temperature(temperature: float) -> None:
    """Raise ConfigError for a temperature that is not finite and positive."""
    if not 0 < temperature < math.inf:
        raise ConfigError("temperature", temperature, "> 0 and finite")


@full_precision
def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared error over images, channels and positions: plain feature mimicking.

    Args:
        student, teacher: (N, C, H, W).
    """
    check_shapes(student, teacher)
    return (student - teacher).square().sum() / max(student.numel(), 1)


@full_precision
def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the squared error of FGD and MGD: summed over channels and positions, averaged over images.

    It grows with C, H and W, so its weights are small and do not transfer between image sizes.

    Args:
        student, teacher: (N, C, H, W).
    """
    check_shapes(student, teacher)
    return (student - teacher).square().sum() / max(len(student), 1)


def spatial_masked_mse(
    student: Tensor, teacher: Tensor, masks: Tensor, weights: Tensor | None = None, eps: float = EPS
) -> Tensor:
    r"""Compute the spatially masked error of ACAM-KD, with D = teacher - student.

    .. math:: L_s = \frac{1}{NM} \sum_{n,m} \frac{\lVert M_m \odot D_n \rVert^2}{C \sum_p M_{m,p}}

    The (N, M, C, H, W) product is never built: with e = sum_c D^2 the numerator is (M^2) @ e.

    Args:
        student, teacher: (N, C, H, W), of equal shape.
        masks: (N, M, H, W), in [0, 1].
        weights: (N, M), of the masks' errors; 1 / M each if left out. MasKD gives weights of its own.
        eps: added to each sum of a mask.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    check_shapes(student, teacher, masks, (0, 2, 3))
    return _spatial(_squares(student, teacher), masks, weights, eps)


def masked_mse(student: Tensor, teacher: Tensor, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""Compute both masked errors of ACAM-KD, or one, with D^2 = (teacher - student)^2 made and kept once.

    The spatial error is that of ``spatial_masked_mse``. The error of the channel masks is

    .. math:: L_c = \frac{1}{NM} \sum_{n,m} \frac{\lVert M_m \odot D_n \rVert^2}{HW \sum_k M_{m,k}}

    Args:
        student, teacher: (N, C, H, W), of equal shape.
        masks: ``"spatial"``: (N, M, H, W), and ``"channel"``: (N, M, C), or one of them.

    Returns:
        The same keys: the error.

    Raises:
        ValueError: the shapes do not fit each other.

    Example:
        >>> student, teacher = torch.zeros(2, 3, 4, 5), torch.full((2, 3, 4, 5), 2.0)
        >>> errors = masked_mse(student, teacher, {"spatial": torch.ones(2, 6, 4, 5), "channel": torch.ones(2, 6, 3)})
        >>> {kind: round(error.item(), 3) for kind, error in errors.items()}  # masks of one: the mean squared error
        {'spatial': 4.0, 'channel': 4.0}
    """
    for kind, dims in (("spatial", (0, 2, 3)), ("channel", (0, 1))):
        check_shapes(student, teacher, masks.get(kind), dims)
    squares = _squares(student, teacher)
    return {kind: MASKED[kind](squares, kind_masks) for kind, kind_masks in masks.items()}


@full_precision
def _squares(student: Tensor, teacher: Tensor) -> Tensor:
    return (teacher - student).square()


@full_precision
def _spatial(squares: Tensor, masks: Tensor, weights: Tensor | None = None, eps: float = EPS) -> Tensor:
    return _masked_error(squares.sum(1).flatten(1), masks.flatten(2), squares.shape[1], weights, eps)


@full_precision
def _channel(squares: Tensor, masks: Tensor) -> Tensor:
    return _masked_error(squares.sum((2, 3)), masks, squares.shape[2] * squares.shape[3])


MASKED = {"spatial": _spatial, "channel": _channel}


def _masked_error(
    energy: Tensor, masks: Tensor, averaged_over: int, weights: Tensor | None = None, eps: float = EPS
) -> Tensor:
    """Average (masks^2 @ energy) / (averaged_over * sum masks) over N and M; energy (N, K), masks (N, M, K)."""
    numerator = torch.einsum("nmk,nk->nm", masks.square(), energy)
    error = numerator / (averaged_over * (masks.sum(2) + eps))
    if weights is not None:
        return (error * weights).sum() / max(len(error), 1)
    return error.sum() / max(error.numel(), 1)


@full_precision
def mask_diversity_loss(masks: Tensor, form: str = "pairwise") -> Tensor:
    r"""Compute the overlap of the masks of an image, averaged over images.

    The first two forms are 0 for disjoint masks and where there is no pair (M = 1). ``"pairwise"`` is the Dice overlap
    of two masks, averaged over ordered pairs, as in MasKD; it is in [0, 1]:

    .. math:: L_{div} = \frac{1}{M(M-1)} \sum_{i \ne j}
              \frac{2 \langle M_i, M_j \rangle}{\lVert M_i \rVert^2 + \lVert M_j \rVert^2}

    ``"ratio"`` is one ratio of sums, as summaries of the ACAM-KD paper print it; it is in [0, M - 1]:

    .. math:: L_{div} = \frac{2 \sum_{i \ne j} \langle M_i, M_j \rangle}
              {\sum_i \lVert M_i \rVert^2 + \sum_j \lVert M_j \rVert^2}

    For masks of equal norm it is M - 1 times the pairwise form: 5 times at M = 6, 18 times at M = 19. A vanished mask
    adds nothing to either of its sums, while it counts as a pair in the pairwise form.

    Neither changes when all masks of an image shrink together, so neither keeps masks from vanishing, and both are
    small where half of the masks are one mask and the others its complement. ``"decorrelated"``, an idea of ours, is
    large in both cases: with the standard deviation s_i of a mask over positions (channels) and the correlation r_ij
    of two,

    .. math:: L_{div} = \frac{1}{M(M-1)} \sum_{i \ne j} r_{ij}^2 + \frac{1}{M} \sum_i \max(0, 1 - s_i / 0.25)

    A constant mask costs 1 / M, a copy or a complement as much as each other.

    Args:
        masks: (N, M, ...), in [0, 1].
        form: ``"pairwise"``, ``"ratio"`` or ``"decorrelated"``.

    Raises:
        ConfigError: the form is unknown.

    Example:
        >>> masks = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])  # two of three are equal
        >>> round(mask_diversity_loss(masks).item(), 4), round(mask_diversity_loss(masks, "ratio").item(), 4)
        (0.3333, 0.6667)
    """
    check_form(form)
    flat = masks.flatten(2)
    if form == "decorrelated":
        return _decorrelated(flat)
    inner = flat @ flat.transpose(1, 2)  # (N, M, M)
    squares = flat.square().sum(2)
    others = torch.eye(flat.shape[1], dtype=torch.bool, device=flat.device).logical_not()
    if form == "ratio":
        overlap = inner.masked_fill(~others, 0.0).sum((1, 2)) / squares.sum(1).clamp_min(1e-12)
        return overlap.sum() / max(len(overlap), 1)
    dice = 2 * inner / (squares[:, :, None] + squares[:, None, :]).clamp_min(1e-12)
    overlap = dice.masked_fill(~others, 0.0).sum()
    return overlap / max(flat.shape[0] * flat.shape[1] * (flat.shape[1] - 1), 1)


def _decorrelated(flat: Tensor) -> Tensor:
    """Compute the form of that name for (N, M, K) masks."""
    n, m, k = flat.shape
    centred = (flat - flat.mean(2, keepdim=True)) / max(k, 1) ** 0.5
    covariance = centred @ centred.transpose(1, 2)
    variance = covariance.diagonal(dim1=1, dim2=2)
    squared = covariance.square() / (variance[:, :, None] * variance[:, None, :] + CORRELATION_EPS)
    others = torch.eye(m, dtype=torch.bool, device=flat.device).logical_not()
    contrast = (1 - (variance + VARIANCE_EPS).sqrt() / CONTRAST).relu()
    pairs = squared.masked_fill(~others, 0.0).sum() / max(n * m * (m - 1), 1)
    return pairs + contrast.sum() / max(n * m, 1)
