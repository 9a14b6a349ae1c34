"""ACAM-KD: adaptive and cooperative attention masking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from ...core.distiller import NOTHING_KNOWN, Distiller, align_levels, check_weights, method_arguments
from ...core.features import Channels, Features
from ...core.registry import DISTILLER_REGISTRY, FUSION_REGISTRY
from ...core.targets import Targets
from ..parts.losses import mask_diversity_loss
from ..parts.masked import mask_overlaps, masked_errors
from ..parts.standardized import check_features, standardized
from ..recipes import RECIPES
from .fusion import CrossAttentionFusion, TeacherFusion
from .masking import FusedLevel, make_masks
from .settings import (
    check_attention,
    check_masks,
    check_pooling,
    form_title,
    masking_class,
    masks_per_level,
    pooling_factor,
    untrained_masks,
)

__all__ = ["ACAMKD"]

VANISHED = 0.01
"""The mean below which a mask selects next to nothing."""


@dataclass
class _Masked:
    """The result of one level's masks of one kind in the last step; everything detached."""

    masks: Tensor  # (N, M, H, W) or (N, M, C)
    mse: Tensor


@DISTILLER_REGISTRY.register()
class ACAMKD(Distiller):
    """Masked feature distillation whose masks come from student and teacher together, anew at every step.

    Lan & Tian, ICCV 2025, arXiv 2503.06307. Per level, cross-attention fuses the aligned student and the teacher
    (STCA-FF). Learnable units select spatial and channel masks from the fused map (ASCM). The masks weigh the squared
    error D^2 = (F_T - align(F_S))^2:

        L = alpha (L_s + L_c) + lambda_div L_div,    summed over levels

    with L_s, L_c and L_div as in ``losses.py``; L_div is the sum over the two kinds of masks.

    Two forms have names, which the log shows when the method is built:

    * **literal**, ``mask_gradient="full"`` and ``diversity="ratio"``: the method as the paper describes it, as far as
      summaries of the paper tell. With the full gradient masks can collapse, because a smaller mask is a smaller
      loss (docs/masks.md).
    * **ours**, the default, ``mask_gradient="detached"`` and ``diversity="pairwise"``: in our measurements the best of
      the forms, or level with the best. Both settings are departures from the paper.

    Args:
        student_channels, teacher_channels: the levels to distil.
        alpha: weight of the masked errors.
        lambda_div: weight of the diversity loss.
        num_masks: M; 0 for the paper's number: 6 on features, the number of classes on a logit map.
        spatial_masking: name of a masking over positions, or ``""`` for none. ``"UniformMasking"`` without a channel
            masking is plain mimicking.
        channel_masking: name of a masking over channels, or ``""`` for none.
        fusion: name of a fusion; ``"TeacherFusion"`` leaves the student out. Maskings without parameters get the
            teacher's map in any case, because nothing would train a fusion.
        query: the query source of the cross-attention, ``"teacher"`` or ``"student"``.
        mask_gradient: the gradient that trains fusion and units. ``"detached"``: that of L_div alone; L_s and L_c see
            the masks as constants, and the student is not trained through the masks. ``"full"``: that of all losses.
            ``"reversed"``: as detached, but the masks ascend L_s and L_c, which the student descends; they leave
            positions whose error is below about half of the mask's mean.
            ``"frozen"``: none; a control. The former name of ``"full"`` is ``"paper"``.
        diversity: the form of L_div: ``"pairwise"``, ``"ratio"``, which is about M - 1 times as large, or
            ``"decorrelated"``, whose minimum is neither constant masks nor one mask and its complement.
        standardize_fused: before the selection units, standardise every channel of the fused map over positions
            (and its mean over channels for the channel masks). A departure from the paper.
        features: ``"raw"``, or ``"standardized"``: every channel of both maps over the batch, as in PKD, before fusion
            and errors. The weight then does not depend on the scale of the networks. A departure from the paper, which
            the recipes for detectors take.
        max_positions: the number of positions above which a level is pooled before fusion, by whole factors; 0 for
            never. A departure from the paper.
        pooling: the pooled maps. ``"keys"``: the key/value source, so that masks keep their resolution; ``"all"``:
            both maps, and the spatial masks are scaled up again.
        attention_precision: the type in which the cross-attention is computed: ``"float32"``, ``"bfloat16"`` or
            ``"float16"``. ``"auto"`` is bfloat16 on a GPU that has it, and float32 elsewhere; autocast comes before it.

    Raises:
        ConfigError: an argument is out of range, names nothing known, or does not go with another.

    Example:
        >>> import torch
        >>> method = ACAMKD(student_channels={"p3": 16}, teacher_channels={"p3": 24}, alpha=1.0)
        >>> losses = method({"p3": torch.rand(2, 16, 12, 20)}, {"p3": torch.rand(2, 24, 12, 20)})
        >>> sorted(losses)
        ['loss_acam_channel', 'loss_acam_diversity', 'loss_acam_spatial']
    """

    recipes = RECIPES["ACAMKD"]
    renamed = {"standardize": "standardize_fused"}
    renamed_values = {"mask_gradient": {"paper": "full"}}

    def __init__(
        self,
        student_channels: Channels,
        teacher_channels: Channels,
        *,
        alpha: float = 1.0,
        lambda_div: float = 1.0,
        num_masks: int = 0,
        spatial_masking: str = "SpatialMasking",
        channel_masking: str = "ChannelMasking",
        fusion: str = "CrossAttentionFusion",
        query: str = "teacher",
        mask_gradient: str = "detached",
        diversity: str = "pairwise",
        standardize_fused: bool = False,
        features: str = "raw",
        max_positions: int = 0,
        pooling: str = "keys",
        attention_precision: str = "auto",
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        check_weights(alpha=alpha, lambda_div=lambda_div)
        check_masks(num_masks, spatial_masking, channel_masking, mask_gradient, diversity)
        check_pooling(max_positions, pooling, fusion)
        check_attention(attention_precision, fusion)
        check_features(features)
        self.alpha, self.lambda_div = alpha, lambda_div
        self.mask_gradient, self.diversity, self.query = mask_gradient, diversity, query
        self.standardize_fused, self.max_positions, self.pooling = standardize_fused, max_positions, pooling
        self.num_masks, self.features, self.attention_precision = num_masks, features, attention_precision
        teacher = self.teacher_levels
        masks = masks_per_level(teacher, num_masks)
        self.align = align_levels(self.student_levels, teacher)
        self.masking = nn.ModuleDict()
        if spatial_masking:
            make = masking_class("spatial", spatial_masking)
            self.masking["spatial"] = nn.ModuleDict(
                {level: make(spec.channels, num_masks=masks[level]) for level, spec in teacher.items()}
            )
        if channel_masking:
            make = masking_class("channel", channel_masking)
            self.masking["channel"] = nn.ModuleDict({level: make(num_masks=masks[level]) for level in teacher})
        make = FUSION_REGISTRY.get(fusion)
        self.fusion = nn.ModuleDict({level: make(spec.channels, query=query) for level, spec in teacher.items()})
        if not any(True for _ in self.masking.parameters()):  # nothing would train a fusion
            self.fusion = nn.ModuleDict({level: TeacherFusion(spec.channels) for level, spec in teacher.items()})
        for module in self.fusion.values():
            if isinstance(module, CrossAttentionFusion):
                module.precision = attention_precision
        if mask_gradient in ("detached", "reversed"):
            self.auxiliary = ("loss_acam_diversity",)
        if mask_gradient == "frozen":
            self.masking.requires_grad_(False)
            self.fusion.requires_grad_(False)

    def title(self) -> str:
        """Return the form that runs: "ours", "literal", or the settings that make it another one."""
        if type(self) is not ACAMKD:
            return super().title()
        maskings = {kind: _class_name(levels) for kind, levels in self.masking.items()}
        running = {
            "num_masks": self.num_masks,
            "spatial_masking": maskings.get("spatial", ""),
            "channel_masking": maskings.get("channel", ""),
            "fusion": _class_name(self.fusion),
            "query": self.query,
            "standardize_fused": self.standardize_fused,
            "features": self.features,
            "max_positions": self.max_positions,
            "attention_precision": self.attention_precision,
        }
        defaults = method_arguments(ACAMKD)
        changed = {name: value for name, value in running.items() if value != defaults[name]}
        if masks_per_level(self.teacher_levels, self.num_masks) == masks_per_level(self.teacher_levels, 0):
            changed.pop("num_masks", None)  # the default, written out
        return form_title(self.mask_gradient, self.diversity, changed)

    def forward(self, student: Features, teacher: Features, targets: Targets = NOTHING_KNOWN) -> dict[str, Tensor]:
        """Return ``loss_acam_spatial``, ``loss_acam_channel`` and ``loss_acam_diversity``, as configured."""
        self._step = {}
        compared = self.compared(student, teacher)
        masks = self._masks(compared)
        kinds = list(self.masking)
        made = {kind: [of_level[kind] for of_level in masks] for kind in kinds}
        weighing = masks
        if self.mask_gradient != "full":
            held = _reversed if self.mask_gradient == "reversed" else Tensor.detach
            weighing = [{kind: held(m) for kind, m in of_level.items()} for of_level in masks]
        errors = masked_errors([own for own, _ in compared], [theirs for _, theirs in compared], weighing)
        for i, level in enumerate(self.levels):
            self._step[level] = {kind: _Masked(made[kind][i].detach(), errors[kind].detach()[i]) for kind in kinds}
        learning = [kind for kind in kinds if _learns(self.masking[kind])]
        losses: dict[str, Tensor] = {}
        for kind in kinds:
            losses[f"loss_acam_{kind}"] = self.alpha * errors[kind].sum()
            if [kind] == learning[:1]:
                overlaps = mask_overlaps([m for k in learning for m in made[k]], self.diversity)
                losses["loss_acam_diversity"] = self.lambda_div * overlaps.sum()
        return losses

    def compared(self, student: Features, teacher: Features) -> list[tuple[Tensor, Tensor]]:
        """Return the aligned student and the teacher of every level, as they are fused and compared."""
        maps = [self.align[level](student[level]) for level in self.levels]
        maps += [teacher[level].detach() for level in self.levels]
        if self.features == "standardized":
            maps = standardized(maps)
        return list(zip(maps[: len(self.levels)], maps[len(self.levels) :]))

    def _masks(self, compared: Sequence[tuple[Tensor, Tensor]]) -> list[dict[str, Tensor]]:
        """Make the masks of all levels."""
        sizes = [aligned.shape[2:] for aligned, _ in compared]
        factors = [pooling_factor(height, width, self.max_positions) for height, width in sizes]
        levels = []
        for level, factor, (aligned, teacher) in zip(self.levels, factors, compared):
            if self.mask_gradient != "full":
                aligned = aligned.detach()
            if factor and (self.pooling == "all" or self.query == "teacher"):
                aligned = F.avg_pool2d(aligned, factor, ceil_mode=True)
            if factor and (self.pooling == "all" or self.query == "student"):
                teacher = F.avg_pool2d(teacher, factor, ceil_mode=True)
            maskings = {kind: masking[level] for kind, masking in self.masking.items()}  # type: ignore[index]
            levels.append(FusedLevel(self.fusion[level], maskings, aligned, teacher))
        found = make_masks(levels, standardize=self.standardize_fused)
        for masks, factor, size in zip(found, factors, sizes):
            if factor and self.pooling == "all" and "spatial" in masks:
                scaled = F.interpolate(masks["spatial"], scale_factor=factor, mode="bilinear")
                masks["spatial"] = scaled[..., : size[0], : size[1]]
        return found

    def metrics(self) -> dict[str, Tensor]:
        """Return figures of the masks, per level and kind.

        They are the mean, the standard deviation over positions (channels), the smallest sum, the pairwise Dice overlap
        and the masked error. The overlap is that of pairs whatever the form of L_div, so that runs can be compared.
        """
        values: dict[str, Tensor] = {}
        for level, kinds in self._step.items():
            for kind, masked in kinds.items():
                flat = masked.masks.float().flatten(2)
                if not flat.numel():
                    continue
                name = f"{level}/{kind}"
                values[f"{name}_mean"] = flat.mean()
                values[f"{name}_std"] = flat.std(2, unbiased=False).mean()
                values[f"{name}_min_sum"] = flat.sum(2).min()
                values[f"{name}_dice"] = mask_diversity_loss(masked.masks)
                values[f"{name}_mse"] = masked.mse
        return values

    def masks(self) -> dict[str, dict[str, Tensor]]:
        """Return, per level, the masks of the last step."""
        return {level: {kind: masked.masks for kind, masked in kinds.items()} for level, kinds in self._step.items()}

    def warnings(self) -> dict[str, str]:
        """Report every level and kind with at least half of its masks vanished: with a mean below ``VANISHED``.

        Before the first step, report masks that nothing will train.
        """
        problems = {}
        if not self._step and _learns(self.masking):
            masks = masks_per_level(self.teacher_levels, self.num_masks)
            if text := untrained_masks(self.mask_gradient, self.lambda_div, masks, self.diversity):
                problems["masks"] = text
        for level, kinds in self._step.items():
            for kind, masked in kinds.items():
                means = masked.masks.float().flatten(2).mean((0, 2))  # (M,)
                vanished = int((means < VANISHED).sum())
                if vanished * 2 >= len(means):
                    remedy = "set {standardize_fused} to True" if not self.standardize_fused else "lower {lambda_div}"
                    if self.mask_gradient in ("full", "reversed"):
                        remedy = "set {mask_gradient} to 'detached'"
                    problems[f"{level}/{kind}"] = (
                        f"masks collapsed: {vanished} of {len(means)} {kind} masks of level {level} have a mean below "
                        f"{VANISHED} and select next to nothing; {remedy}"
                    )
        return problems


def _reversed(masks: Tensor) -> Tensor:
    """Return the same masks; their gradient changes its sign."""
    return 2 * masks.detach() - masks


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _class_name(levels: nn.Module) -> str:
    """Return the name of the class of the modules of all levels."""
    return next((type(module).__name__ for module in levels.children()), "")
