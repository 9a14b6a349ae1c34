"""From two configs to the parts of a distillation: what is inherited, what is tapped, which method."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import nn

from ..core import (
    CLASSES,
    DISTILLER_REGISTRY,
    LOGITS,
    FeatureSpec,
    FrozenTeacher,
    PixelTransform,
    build_distiller,
    inherit,
    match_levels,
    method_arguments,
)
from ..core.features import describe
from ..core.methods import check_boxes_known, check_taps_used
from .class_heads import backbone_and_classes, check_class_heads, class_head
from .config import META_ARCHITECTURE
from .taps import backbone_and_logits, backbone_of, divisibility, logits_module, pyramid
from .targets import ReadTargets

__all__ = ["build_distillation", "inherit_from_teacher"]

logger = logging.getLogger("detectron2.acam_kd.meta_arch")


def build_distillation(
    cfg: CfgNode,
    methods: Sequence[str],
    student: nn.Module,
    teacher_cfg: CfgNode,
    detector: nn.Module,
    taps: Sequence[str],
) -> dict[str, Any]:
    """The arguments of ``DistillationMetaArch`` that make a distillation out of a student and its teacher.

    Args:
        cfg, teacher_cfg: the two configs.
        methods: names; at least one.
        student, detector: built from them; the teacher's weights are loaded.
        taps: see ``read_taps``.

    Raises:
        KeyError: a method, or a level, is unknown.
        ValueError: student, teacher, taps and methods do not fit each other.
    """
    if cfg.DISTILL.STUDENT_META_ARCHITECTURE == "SemanticSegmentor":
        check_boxes_known(methods, cfg.DISTILL.STUDENT_META_ARCHITECTURE)
    check_taps_used(taps, methods)
    own, other = pyramid(student, taps, student=True), pyramid(detector, taps)
    _check_divisibility(cfg, student, detector)
    levels = match_levels(own, other, cfg.DISTILL.LEVELS)
    logger.info("distilling with %s on %s", cfg.DISTILL.METHOD, ", ".join(f"{s} <- {t}" for s, t in levels.items()))
    if not cfg.DISTILL.LEVELS and len(levels) < len(own):
        logger.warning(
            "not every level of the student has a partner of its stride. student: %s; teacher: %s",
            describe(own),
            describe(other),
        )
    for level in levels:
        if own[level].logits:
            _check_class_names(cfg, teacher_cfg, own[level])
    distiller = build_distiller(
        {name: _arguments(cfg, name) for name in methods},
        {s: own[s] for s in levels},
        {s: other[t] for s, t in levels.items()},
    )
    built: dict[str, Any] = {"distiller": distiller, "levels": {s: levels[s] for s in distiller.levels}}
    built["read_targets"] = ReadTargets(student)
    transform = _pixel_transform(cfg, teacher_cfg)
    how: dict[str, Any] = {"precision": cfg.DISTILL.TEACHER.PRECISION, "compiled": cfg.DISTILL.TEACHER.COMPILE}
    if CLASSES in levels:
        check_class_heads(student, detector)
        teacher = FrozenTeacher(detector, transform, backbone_and_classes, **how)
        return {**built, "teacher": teacher, "class_head": class_head(student)}
    if LOGITS in taps:
        teacher = FrozenTeacher(detector, transform, backbone_and_logits, **how)
        return {**built, "teacher": teacher, "logits": logits_module(student), "extract": backbone_and_logits}
    return {**built, "teacher": FrozenTeacher(backbone_of(detector), transform, **how)}  # the heads are let go


def _arguments(cfg: CfgNode, name: str) -> dict[str, Any]:
    """A method's constructor arguments, from its node."""
    if name.upper() not in cfg.DISTILL:
        raise KeyError(f"{name} was registered after add_distillation_config(cfg); import it before")
    node = cfg.DISTILL[name.upper()]
    return {key: node[key.upper()] for key in method_arguments(DISTILLER_REGISTRY.get(name))}


def _check_class_names(cfg: CfgNode, teacher_cfg: CfgNode, predicted: FeatureSpec) -> None:
    """The classes must be the same, in the same order, as far as the names are known.

    More or fewer names than classes are predicted are those of other data than the model's: a config that says nothing
    of its data has that of its base.
    """
    background = predicted.tap == CLASSES and not predicted.sigmoid
    names = [_class_names(config) for config in (cfg, teacher_cfg)]
    known = all(len(found) == predicted.channels - background for found in names)
    if known and names[0] != names[1]:
        raise ValueError(
            f"the student learns the classes {', '.join(names[0])}; the teacher knows {', '.join(names[1])}: their "
            "predictions do not correspond (keys: DISTILL.METHOD, DISTILL.TAPS, DATASETS.TRAIN of either config, of "
            "the teacher's in DISTILL.TEACHER.OPTS)"
        )


def _class_names(config: CfgNode) -> list[str]:
    """Of the training data, where it is registered here and says them."""
    kind = "stuff_classes" if config.MODEL.META_ARCHITECTURE == "SemanticSegmentor" else "thing_classes"
    if (
        config.MODEL.META_ARCHITECTURE == META_ARCHITECTURE
        and config.DISTILL.STUDENT_META_ARCHITECTURE == "SemanticSegmentor"
    ):
        kind = "stuff_classes"
    known = [name for name in config.DATASETS.TRAIN if name in MetadataCatalog.list()]
    return list(MetadataCatalog.get(known[0]).get(kind, [])) if known else []


def _check_divisibility(cfg: CfgNode, student: nn.Module, detector: nn.Module) -> None:
    """The teacher sees the student's batch, so the student's padding, or the crop, has to do for it."""
    needed, own = divisibility(backbone_of(detector)), divisibility(backbone_of(student), padding=True)
    if own % needed == 0:
        return
    hint = ""
    if cfg.DISTILL.STUDENT_META_ARCHITECTURE == "SemanticSegmentor":
        crop = math.gcd(*(int(side) for side in cfg.INPUT.CROP.SIZE)) if cfg.INPUT.CROP.ENABLED else 1
        if crop % needed == 0 and crop % own == 0:  # smaller images are padded to the crop
            return
        hint = f", or crops whose sides are multiples of {math.lcm(needed, own)} (INPUT.CROP)"
    raise ValueError(
        f"the teacher's backbone needs sides that are multiples of {needed}, the student's batches are padded to "
        f"multiples of {own}: choose a teacher (DISTILL.TEACHER.CONFIG_FILE) with a backbone like the student's{hint}"
    )


def _pixel_transform(cfg: CfgNode, teacher_cfg: CfgNode) -> PixelTransform:
    formats = (cfg.INPUT.FORMAT, teacher_cfg.INPUT.FORMAT)
    if formats[0] != formats[1] and set(formats) != {"BGR", "RGB"}:
        raise ValueError(
            f"INPUT.FORMAT is {formats[0]} for the student, {formats[1]} for the teacher: no way between them"
        )
    return PixelTransform(
        student_mean=cfg.MODEL.PIXEL_MEAN,
        student_std=cfg.MODEL.PIXEL_STD,
        teacher_mean=teacher_cfg.MODEL.PIXEL_MEAN,
        teacher_std=teacher_cfg.MODEL.PIXEL_STD,
        reverse_channels=formats[0] != formats[1],
    )


def _kind(meta_architecture: str, cfg: CfgNode) -> tuple[str, str]:
    heads = cfg.MODEL.ROI_HEADS.NAME if meta_architecture in ("GeneralizedRCNN", "PanopticFPN") else ""
    return meta_architecture, heads


def inherit_from_teacher(cfg: CfgNode, student: nn.Module, teacher_cfg: CfgNode, detector: nn.Module) -> None:
    """Neck and head from the teacher, all but the backbone proper; MODEL.WEIGHTS is loaded later and wins."""
    kinds = _kind(cfg.DISTILL.STUDENT_META_ARCHITECTURE, cfg), _kind(teacher_cfg.MODEL.META_ARCHITECTURE, teacher_cfg)
    if cfg.DISTILL.INHERIT == "never":
        logger.info("nothing is inherited from the teacher: DISTILL.INHERIT is 'never'")
        return
    if cfg.DISTILL.INHERIT == "auto" and (kinds[0] != kinds[1] or kinds[0][0] == "SemanticSegmentor"):
        logger.info("nothing is inherited: the student is %s, the teacher %s (DISTILL.INHERIT)", *kinds)
        return
    proper = "backbone.bottom_up." if hasattr(backbone_of(student), "bottom_up") else "backbone."
    logger.info("%s", inherit(student, detector, exclude=[proper]))
