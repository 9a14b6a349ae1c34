"""SAMKD: masks at several resolutions and weighted logits, a reconstruction from public summaries."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ..core.distiller import NOTHING_KNOWN, Distiller, align_levels, check_weights
from ..core.errors import ConfigError
from ..core.features import BACKBONE, CLASSES, Channels, Features
from ..core.registry import DISTILLER_REGISTRY
from ..core.targets import Targets
from .kd import binary_kd_loss
from .parts.attention import attention_of
from .parts.generation import Generator, check_fraction, hide_largest, rebuilt_of_two
from .parts.losses import check_shapes, check_temperature, full_precision, squared_error
from .recipes import RECIPES

__all__ = ["SAMKD", "difference_weights", "hide_cells"]

TEMPERATURE = 0.5
"""The temperature of the attention, as in DMKD; the order of cells and channels hardly depends on it."""
CELLS = (16, 8, 4, 2, 1)
MOST = len(CELLS)
EPS = 1e-12


def hide_cells(attention: Tensor, fraction: float, cell: int) -> Tensor:
    """Return 0 in the cells of largest mean attention, 1 in the others: (N, H, W) -> (N, 1, H, W).

    Args:
        attention: (N, H, W).
        fraction: of the cells that are hidden; their number is rounded down.
        cell: the side of a cell, in positions. Cells at the right and lower border may be smaller.
    """
    height, width = attention.shape[1:]
    means = F.avg_pool2d(attention[:, None], cell, ceil_mode=True, count_include_pad=False)
    kept = hide_largest(means.flatten(1), fraction).view_as(means)
    return kept.repeat_interleave(cell, 2).repeat_interleave(cell, 3)[..., :height, :width]


@full_precision
def difference_weights(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared difference at every position, divided by its mean over the image: (N, H, W), of mean 1.

    Without any difference all weights are 1.

    Args:
        student, teacher: (N, C, H, W), of equal shape.
    """
    check_shapes(student, teacher)
    difference = (student - teacher).square().mean(1)
    mean = difference.mean((1, 2), keepdim=True)
    return torch.where(mean > EPS, difference / mean.clamp_min(EPS), torch.ones_like(difference))


@DISTILLER_REGISTRY.register()
class SAMKD(Distiller):
    """Rebuilding after masks of several resolutions, and logits weighted by the difference of the features.

    It is a RECONSTRUCTION of SAMKD (Zhang, Li, Li and Xu, 2025, arXiv 2501.07101). No code is public, and the paper's
    equations and weights were not at hand, so results are not those of the paper. Each sentence names its source: the
    abstract, a note, which is a third party's summary, or ours, a choice made here.

    The student's features are masked by a spatial pyramid, from coarse to fine, and rebuilt (abstract). The pyramid
    consists of grids of several resolutions (note). Two attention maps of the teacher guide the masks (note). They are
    taken for the spatial and the channel attention (ours). Logits are distilled beside the features (abstract).
    Regions of the logits are weighted by the difference of the features there (note). All formulas are ours:

        B_g = 0 in the rho_s of all g x g cells with the largest mean spatial attention of F_T, else 1
        B_c = 0 for the rho_c C channels of largest channel attention of F_T, else 1
        L_features = alpha / N mean_g sum ( w_s G_s(B_g * align(F_S)) + w_c G_c(B_c * align(F_S)) - F_T )^2
        L_logits   = beta T^2 sum_a v_a KL(a) / max(1, the teacher's count of objects)

    Cells have the side g = 2^(resolutions - 1), ..., 2, 1 (ours). The attention is FGD's, G_s and G_c are generators of
    MGD, and w = softmax(a_s, a_c) is learnt (ours, as in DMKD). All resolutions share the generators (ours). A region
    is a position, and the weight v of its anchors is ``difference_weights``, without a gradient (ours). Weights and
    fractions are those of DMKD and KD (ours). With one resolution L_features is DMKD's; with equal weights L_logits is
    KD's. The paper's student is an FCOS taught by an FCOS (abstract).

    Args:
        student_channels, teacher_channels: all levels that the class head sees, from the finest, and its classes.
        alpha: weight of the features' error, summed over levels.
        rho_s: fraction of the cells that are hidden, in [0, 1].
        rho_c: fraction of the channels that are hidden, in [0, 1].
        resolutions: the number of grids.
        beta: weight of the logits' loss.
        temperature: T.

    Raises:
        ConfigError: an argument is out of range, or there are no maps, or not one level of classes by sigmoids. In
            ``forward``: the classes are not those of all positions.

    Example:
        >>> from acam_kd.core import FeatureSpec
        >>> levels = {"p3": 8, "classes": FeatureSpec(5, 0, logits=True, sigmoid=True)}
        >>> method = SAMKD(levels, levels)
        >>> maps = {"p3": torch.rand(2, 8, 6, 10), "classes": torch.rand(2, 5, 60, 1)}
        >>> sorted(method(maps, {level: x + 1 for level, x in maps.items()}))
        ['loss_samkd_features', 'loss_samkd_logits']
    """

    reads = (BACKBONE, CLASSES)
    families = ("retinanet", "fcos", "reppoints", "")
    recipes = RECIPES["SAMKD"]

    def __init__(
        self,
        student_channels: Channels,
        teacher_channels: Channels,
        *,
        alpha: float = 2e-5,
        rho_s: float = 0.65,
        rho_c: float = 0.15,
        resolutions: int = 3,
        beta: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        check_weights(alpha=alpha, beta=beta)
        check_fraction(rho_s=rho_s, rho_c=rho_c)
        check_temperature(temperature)
        if not isinstance(resolutions, int) or not 1 <= resolutions <= MOST:
            raise ConfigError("resolutions", resolutions, f"a whole number from 1 to {MOST}")
        self.alpha, self.rho_s, self.rho_c, self.cells = alpha, rho_s, rho_c, CELLS[-resolutions:]
        self.beta, self.temperature = beta, temperature
        maps = {level: spec for level, spec in self.student_levels.items() if not spec.logits}
        predicted = [level for level, spec in self.student_levels.items() if spec.logits and spec.sigmoid]
        if not maps or len(predicted) != 1 or len(maps) + 1 != len(self.levels):
            raise ConfigError(
                "levels", ", ".join(self.levels), "maps and the classes of a dense head, by sigmoids, as p3, classes"
            )
        self.maps, self.classes = list(maps), predicted[0]
        self.align = align_levels(maps, self.teacher_levels)
        widths = {level: self.teacher_levels[level].channels for level in maps}
        self.generate_s = nn.ModuleDict({level: Generator(width) for level, width in widths.items()})
        self.generate_c = nn.ModuleDict({level: Generator(width) for level, width in widths.items()})
        self.balance = nn.ParameterDict({level: nn.Parameter(torch.zeros(2)) for level in maps})

    def forward(self, student: Features, teacher: Features, targets: Targets = NOTHING_KNOWN) -> dict[str, Tensor]:
        """Return ``loss_samkd_features`` and ``loss_samkd_logits``."""
        errors, weights, self._step = [], [], {"masks": {}, "metrics": {}}
        for level in self.maps:
            aligned, target = self.align[level](student[level]), teacher[level].detach()
            errors.append(self._rebuilding_error(level, aligned, target))
            weights.append(difference_weights(aligned.detach(), target).flatten(1))
            self._step["metrics"][f"{level}/mse"] = errors[-1].detach() / math.prod(target.shape[1:])
            self._step["metrics"][f"{level}/spatial_weight"] = self.balance[level].detach().softmax(0)[0]
        logits = student[self.classes], teacher[self.classes].detach()
        of_anchors = self._of_anchors(torch.cat(weights, 1), logits[0])
        return {
            "loss_samkd_features": self.alpha * sum(errors),  # type: ignore[dict-item]
            "loss_samkd_logits": self.beta * binary_kd_loss(*logits, self.temperature, of_anchors),
        }

    def _rebuilding_error(self, level: str, aligned: Tensor, target: Tensor) -> Tensor:
        """Return the squared error of one level, averaged over the resolutions."""
        attention = attention_of(target, TEMPERATURE)
        spatial = torch.cat([hide_cells(attention.spatial, self.rho_s, cell) for cell in self.cells], 1)
        channel = hide_largest(attention.channel, self.rho_c)
        generators, balance = (self.generate_s[level], self.generate_c[level]), self.balance[level].softmax(0)
        rebuilt = [rebuilt_of_two(aligned, mask[:, None], channel, generators, balance) for mask in spatial.unbind(1)]
        self._step["masks"][level] = {"spatial": spatial, "channel": channel[:, None]}
        errors = torch.stack([squared_error(x, target) for x in rebuilt])
        return errors.mean()

    def _of_anchors(self, weights: Tensor, logits: Tensor) -> Tensor:
        """Return the weights of anchors, (N, A, 1), of the weights of positions, (N, P); a position has A / P."""
        anchors, rest = divmod(logits.shape[2], max(weights.shape[1], 1))
        if rest or not anchors:
            raise ConfigError(
                "levels", f"{weights.shape[1]} positions and {logits.shape[2]} anchors of {self.classes}",
                "as many anchors at every position", "name all levels that the class head sees",
            )  # fmt: skip
        return weights.repeat_interleave(anchors, 1)[..., None]

    def metrics(self) -> dict[str, Tensor]:
        """Return, per level, the unweighted error as a mean over channels and positions, and w_s."""
        return dict(self._step.get("metrics", {}))

    def masks(self) -> dict[str, dict[str, Tensor]]:
        """Return, per level, the positions that each resolution kept in the last step, and the channels."""
        return dict(self._step.get("masks", {}))
