"""The checks of ACAM-KD's arguments, and the names of its forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...core.errors import ConfigError
from ...core.features import Pyramid
from ...core.registry import FUSION_REGISTRY, MASKING_REGISTRY
from ..parts.losses import check_form
from .fusion import CrossAttentionFusion
from .paths import check_precision

__all__ = [
    "check_attention",
    "check_masks",
    "check_pooling",
    "form_title",
    "masking_class",
    "masks_per_level",
    "pooling_factor",
    "untrained_masks",
]

MASK_GRADIENTS = ("detached", "full", "reversed", "frozen")
POOLING = ("keys", "all")
NAMED = {("detached", "pairwise"): "ours", ("full", "ratio"): "literal"}
"""Mask gradient and form of the diversity loss -> the name of the method with these and nothing else changed."""


def form_title(mask_gradient: str, diversity: str, changed: Mapping[str, Any]) -> str:
    """Name a form of the method for the log.

    Args:
        mask_gradient, diversity: the arguments of ``ACAMKD``.
        changed: its other arguments, but for the weights of the losses, that differ from their defaults.

    Example:
        >>> form_title("detached", "pairwise", {})
        'ACAM-KD, ours (mask_gradient=detached, diversity=pairwise)'
        >>> form_title("detached", "pairwise", {"features": "standardized"})
        'ACAM-KD, ours (mask_gradient=detached, diversity=pairwise, features=standardized)'
        >>> form_title("full", "ratio", {"query": "student"})
        'ACAM-KD, mask_gradient=full, diversity=ratio, query=student'
    """
    settings = {"mask_gradient": mask_gradient, "diversity": diversity, **changed}
    listed = ", ".join(f"{name}={value or 'none'}" for name, value in settings.items())
    name = NAMED.get((mask_gradient, diversity), "")
    if set(changed) - ({"features"} if name == "ours" else set()):  # the recipes for detectors standardise
        name = ""
    return f"ACAM-KD, {name} ({listed})" if name else f"ACAM-KD, {listed}"


def check_masks(num_masks: int, spatial_masking: str, channel_masking: str, mask_gradient: str, diversity: str) -> None:
    """Raise ConfigError for an unknown form of the method, or for masks of no kind or of a negative number."""
    if mask_gradient not in MASK_GRADIENTS:
        raise ConfigError("mask_gradient", mask_gradient, f"one of {', '.join(MASK_GRADIENTS)}")
    check_form(diversity, "diversity")
    if not spatial_masking and not channel_masking:
        raise ConfigError(
            "spatial_masking",
            "no masks of either kind",
            "at least one masking",
            hint="set {spatial_masking} or {channel_masking}",
        )
    if num_masks < 0:
        raise ConfigError("num_masks", num_masks, ">= 0", hint="0 stands for the paper's number")


def masks_per_level(levels: Pyramid, num_masks: int) -> dict[str, int]:
    """Return M of every level: ``num_masks``, or for 0 the paper's number, 6 on features, the classes on logits."""
    return {level: num_masks or (spec.channels if spec.logits else 6) for level, spec in levels.items()}


def untrained_masks(mask_gradient: str, lambda_div: float, masks: Mapping[str, int], diversity: str) -> str:
    """Return a sentence about learnable masks that no loss trains; empty if there are none.

    Args:
        mask_gradient, lambda_div, diversity: the arguments of ``ACAMKD``.
        masks: level -> M.
    """
    needs_pairs = diversity != "decorrelated"  # which trains the contrast of a single mask, too
    untrained = [level for level, number in masks.items() if not lambda_div or (number == 1 and needs_pairs)]
    if mask_gradient != "detached" or not untrained:
        return ""
    reason, remedy = ("{lambda_div} is 0", "{lambda_div} above 0")
    if lambda_div:
        reason, remedy = "a single mask has no overlap", "{num_masks} to 2 or more"
    return (
        f"nothing trains the masks of {', '.join(untrained)}, which stay near one half: with detached masks the "
        f"diversity loss alone would, and {reason}; set {remedy}, or {{mask_gradient}} to 'full', or to 'frozen' if "
        "that is wanted"
    )


def check_pooling(max_positions: int, pooling: str, fusion: str) -> None:
    """Raise ConfigError for settings of pooling that are unknown, or that the fusion has no use for."""
    if max_positions < 0:
        raise ConfigError("max_positions", max_positions, ">= 0", hint="0 stands for any number of positions")
    if pooling not in POOLING:
        raise ConfigError("pooling", pooling, f"one of {', '.join(POOLING)}")
    if max_positions and not issubclass(FUSION_REGISTRY.get(fusion), CrossAttentionFusion):
        raise ConfigError(
            "max_positions",
            max_positions,
            f"0 for {fusion}, which has no attention that pooling could make cheaper",
            hint="set {max_positions} to 0 or choose another {fusion}",
        )


def pooling_factor(height: int, width: int, max_positions: int) -> int:
    """Return the whole factor by which both sides shrink to leave at most ``max_positions``; 0 for no pooling."""
    if not max_positions or height * width <= max_positions:
        return 0
    factor = 2
    while -(-height // factor) * -(-width // factor) > max_positions:
        factor += 1
    return factor


def check_attention(precision: str, fusion: str) -> None:
    """Raise ConfigError for an unknown precision of the attention, or for one where there is no attention."""
    check_precision(precision, "attention_precision")
    if precision != "auto" and not issubclass(FUSION_REGISTRY.get(fusion), CrossAttentionFusion):
        raise ConfigError(
            "attention_precision",
            precision,
            f"auto for {fusion}, which has no attention",
            hint="set {attention_precision} to auto or choose another {fusion}",
        )


def masking_class(kind: str, name: str) -> Any:
    """Return the registered masking of that name.

    Raises:
        ConfigError: there is none, or it makes masks of another kind.
    """
    masking = MASKING_REGISTRY.get(name, argument=f"{kind}_masking")
    if masking.kind != kind:
        raise ConfigError(f"{kind}_masking", f"{name}, which makes {masking.kind} masks", f"a masking of {kind} masks")
    return masking
