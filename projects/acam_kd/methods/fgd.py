"""FGD: focal and global distillation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.distiller import NOTHING_KNOWN, Distiller, align_levels, check_weights
from ..core.errors import ConfigError
from ..core.features import BACKBONE, NECK_CONVS, Channels, Features
from ..core.registry import DISTILLER_REGISTRY
from ..core.targets import Targets
from .parts.attention import Attention, attention_of
from .parts.losses import check_shapes, check_temperature, full_precision, squared_error
from .recipes import RECIPES

__all__ = ["FGD", "GlobalContext", "attention_loss", "focal_losses", "foreground_mask"]


def foreground_mask(targets: Targets, height: int, width: int) -> Tensor:
    """Compute 1 / area of the smallest box that covers a cell, 0 where no box does.

    A box covers the cells floor(x0) to ceil(x1) and floor(y0) to ceil(y1), both included, in units of the map. Its area
    is their number, including cells outside of the map. An empty box covers a cell too.

    As in the authors' code, image and map are taken to have the same extent. Where the batch is padded, a box is
    therefore stretched over the padding, away from its object. There is no loop over boxes; (B, H, W) numbers are held
    at a time.

    Args:
        targets: boxes, their images, and the images' sizes without padding.
        height, width: H and W of the map.

    Returns:
        (N, H, W).

    Raises:
        ConfigError: the boxes are not known, or not axis-aligned.
    """
    boxes, images, image_sizes = _known_boxes(targets)
    sizes = image_sizes[images].float()
    rows, tall = _covered(boxes[:, 1::2] * height / sizes[:, :1], height)
    columns, wide = _covered(boxes[:, 0::2] * width / sizes[:, 1:], width)
    weights = (rows / (tall * wide))[:, :, None] * columns[:, None, :]  # (B, H, W)
    index = images[:, None, None].expand_as(weights)
    empty = weights.new_zeros(len(image_sizes), height, width)
    return empty.scatter_reduce(0, index, weights, "amax")


def _known_boxes(targets: Targets, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes (B, 4), their images (B,), and the images' sizes (N, 2); ``count`` is the N expected."""
    boxes, images, sizes = targets.boxes, targets.box_images, targets.image_sizes
    if boxes is None or images is None or sizes is None or (count and not len(sizes)):
        raise _boxes_missing("no boxes")
    if count is not None and len(sizes) != count:
        raise _boxes_missing(f"the boxes of {len(sizes)} of {count} images")
    if boxes.shape[-1] != 4:
        raise ConfigError(
            "targets",
            f"boxes of {boxes.shape[-1]} numbers",
            "axis-aligned boxes of 4: x0, y0, x1, y1",
            hint="choose a method that needs no boxes, such as MGD, or give other {targets}",
        )
    return boxes.float(), images, sizes


def _boxes_missing(known: str) -> ConfigError:
    hint = "FGD needs them: choose a method that needs none, such as MGD, or give {targets}"
    return ConfigError("targets", known, "the boxes of every image", hint=hint)


def _covered(ends: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Return the cells of a line that intervals (B, 2) cover, (B, cells), and their number, (B, 1).

    The number includes cells beyond the line.
    """
    first, last = ends[:, :1].floor(), ends[:, 1:].ceil()
    cell = torch.arange(cells, device=ends.device)
    return ((cell >= first) & (cell <= last)).to(ends.dtype), (last + 1 - first).clamp_min(1)


@full_precision
def focal_losses(student: Tensor, teacher: Tensor, masks: Tensor, spatial: Tensor, channel: Tensor) -> Tensor:
    r"""Compute the error at each of K masks, weighed by the teacher's attention.

    .. math:: L_k = \frac1N \sum_{n,c,p} M_{nkp} A^S_{np} A^C_{nc} (S_{ncp} - T_{ncp})^2

    with the spatial attention A^S and the channel attention A^C of the teacher (``attention.py``).

    Args:
        student, teacher: (N, C, H, W).
        masks: (N, K, H, W).
        spatial: A^S, (N, H, W).
        channel: A^C, (N, C).

    Returns:
        (K,).

    Raises:
        ValueError: the shapes do not fit each other.
    """
    check_shapes(student, teacher, masks, (0, 2, 3))
    error = spatial * torch.einsum("nchw,nc->nhw", (student - teacher).square(), channel)
    return torch.einsum("nkhw,nhw->k", masks, error) / max(len(student), 1)


def attention_loss(student: Attention, teacher: Attention) -> Tensor:
    """Sum the absolute differences of the spatial and of the channel attention; averaged over images.

    Args:
        student, teacher: of maps of one shape.

    Raises:
        ValueError: the shapes differ.
    """
    for own, theirs in zip(student, teacher):
        check_shapes(own, theirs)
    differences = [(own - theirs).abs().sum() for own, theirs in zip(student, teacher)]
    return (differences[0] + differences[1]) / max(len(student.spatial), 1)


class GlobalContext(nn.Module):
    """The block of GCNet, which adds a context gathered by one attention over all positions to every position.

    Cao et al., ICCV workshops 2019. Its input and output are (N, C, H, W). It starts as the identity.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 2, 1)
        self.mask = nn.Conv2d(channels, 1, 1)
        self.add = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.LayerNorm([hidden, 1, 1]),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1),
        )
        nn.init.kaiming_normal_(self.mask.weight, mode="fan_in", nonlinearity="relu")
        for parameter in self.add[-1].parameters():
            nn.init.zeros_(parameter)

    @full_precision
    def forward(self, features: Tensor) -> Tensor:
        """Return the features with their context."""
        attention = self.mask(features).flatten(2).softmax(2)  # (N, 1, HW)
        context = features.flatten(2) @ attention.transpose(1, 2)  # (N, C, 1)
        return features + self.add(context[..., None])


@DISTILLER_REGISTRY.register()
class FGD(Distiller):
    """Separate errors of foreground and background, weighed by attention, and of global context; summed over levels.

    Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022. The attention is the teacher's.
    With F = align(F_S), D = F - F_T and the spatial and channel attention A^S, A^C of FKD:

        L = alpha / N sum M_fg A^S_T A^C_T D^2 + beta / N sum M_bg A^S_T A^C_T D^2
          + gamma / N (sum |A^S_F - A^S_T| + sum |A^C_F - A^C_T|) + lambda_rel / N sum (R_S(F) - R_T(F_T))^2

    M_fg is 1 / area of the smallest ground-truth box at a cell (``foreground_mask``). M_bg is 1 where there is no box,
    divided by the number of such cells. R_S and R_T, the relation, are blocks of GCNet, both trained and the identity
    at the start. A departure from the paper: the aligning convolution, which starts as the identity, is there also
    where the channels match.

    The errors are sums over C, H and W: weights do not transfer between image sizes. Recommended (the authors), as
    alpha, beta, gamma, lambda_rel, temperature: 1e-3, 5e-4, 5e-4, 5e-6, 0.5 for RetinaNet (the defaults); 1.6e-3,
    8e-4, 8e-4, 8e-6, 0.8 for FCOS; 5e-5, 2.5e-5, 5e-5, 5e-7, 0.5 on P2 to P5 of Faster and Mask R-CNN. Gradients are
    clipped to a norm of 35, and one-stage students inherit the teacher's neck and head.

    Args:
        student_channels, teacher_channels: the levels to distil, of a backbone.
        alpha: weight of the foreground.
        beta: weight of the background.
        gamma: weight of the attention.
        lambda_rel: weight of the relation, the paper's lambda.
        temperature: of the attention, positive.

    Raises:
        ConfigError: a weight or the temperature is out of range.

    Example:
        >>> import torch
        >>> from acam_kd import Targets
        >>> method = FGD(student_channels={"p3": 16}, teacher_channels={"p3": 24})
        >>> boxes, images = torch.tensor([[8.0, 8, 60, 40]]), torch.tensor([0])
        >>> known = Targets(boxes=boxes, box_images=images, image_sizes=torch.tensor([[96.0, 160]]))
        >>> losses = method({"p3": torch.rand(1, 16, 12, 20)}, {"p3": torch.rand(1, 24, 12, 20)}, known)
        >>> sorted(losses)
        ['loss_fgd_attention', 'loss_fgd_background', 'loss_fgd_foreground', 'loss_fgd_relation']
    """

    reads = (BACKBONE, NECK_CONVS)
    needs = ("boxes",)
    recipes = RECIPES["FGD"]

    def __init__(
        self,
        student_channels: Channels,
        teacher_channels: Channels,
        *,
        alpha: float = 1e-3,
        beta: float = 5e-4,
        gamma: float = 5e-4,
        lambda_rel: float = 5e-6,
        temperature: float = 0.5,
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        check_weights(alpha=alpha, beta=beta, gamma=gamma, lambda_rel=lambda_rel)
        check_temperature(temperature)
        self.weights = {"foreground": alpha, "background": beta, "attention": gamma, "relation": lambda_rel}
        self.temperature = temperature
        self.align = align_levels(self.student_levels, self.teacher_levels)
        self.context_s = nn.ModuleDict(
            {level: GlobalContext(spec.channels) for level, spec in self.teacher_levels.items()}
        )
        self.context_t = nn.ModuleDict(
            {level: GlobalContext(spec.channels) for level, spec in self.teacher_levels.items()}
        )

    def forward(self, student: Features, teacher: Features, targets: Targets = NOTHING_KNOWN) -> dict[str, Tensor]:
        """Return ``loss_fgd_foreground``, ``_background``, ``_attention`` and ``_relation``.

        Raises:
            ConfigError: the boxes of the batch are not known for every image, or not axis-aligned.
        """
        self._step = {"foreground": {}, "terms": {}}
        terms = {level: self._level(level, student[level], teacher[level].detach(), targets) for level in self.levels}
        self._step["terms"] = {level: {k: v.detach() for k, v in each.items()} for level, each in terms.items()}
        return {
            f"loss_fgd_{term}": weight * sum(each[term] for each in terms.values())  # type: ignore[misc]
            for term, weight in self.weights.items()
        }

    def _level(self, level: str, student: Tensor, teacher: Tensor, targets: Targets) -> dict[str, Tensor]:
        _known_boxes(targets, len(teacher))
        aligned = self.align[level](student)
        foreground = foreground_mask(targets, *teacher.shape[2:])
        background = (foreground == 0).to(foreground)
        background = background / background.sum((1, 2), keepdim=True).clamp_min(1)
        masks = torch.stack([foreground, background], 1)
        self._step["foreground"][level] = (foreground > 0).to(foreground)
        ours, theirs = attention_of(aligned, self.temperature), attention_of(teacher, self.temperature)
        focal = focal_losses(aligned, teacher, masks, *theirs)
        return {
            "foreground": focal[0],
            "background": focal[1],
            "attention": attention_loss(ours, theirs),
            "relation": squared_error(self.context_s[level](aligned), self.context_t[level](teacher)),
        }

    def metrics(self) -> dict[str, Tensor]:
        """Return the four terms, unweighted, under ``<level>/fg``, ``bg``, ``att`` and ``rel``."""
        short = {"foreground": "fg", "background": "bg", "attention": "att", "relation": "rel"}
        terms = self._step.get("terms", {})
        return {f"{level}/{short[k]}": v for level, each in terms.items() for k, v in each.items()}

    def masks(self) -> dict[str, dict[str, Tensor]]:
        """Return, per level, the cells that a box covered in the last step."""
        foreground = self._step.get("foreground", {})
        return {level: {"spatial": covered[:, None]} for level, covered in foreground.items()}
