"""The meta-architecture: reads the config, once, and builds student, teacher and method from it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from ..core import (
    DISTILLER_REGISTRY,
    LOGITS,
    DistillationModel,
    Distiller,
    FrozenTeacher,
    PixelTransform,
    inherit,
    match_levels,
    method_arguments,
)
from ..core.features import describe
from ..core.model import backbone_features
from ..core.teacher import Extract
from .config import INHERIT, META_ARCHITECTURE, student_config
from .taps import backbone_and_logits, backbone_of, divisibility, logits_module, pyramid, read_taps
from .teacher import build_teacher
from .visualize import put_masks

__all__ = ["DistillationMetaArch"]

logger = logging.getLogger("detectron2.acam_kd")


@META_ARCH_REGISTRY.register()
class DistillationMetaArch(DistillationModel):
    """Distils any registered meta-architecture that has a ``backbone`` from a frozen teacher.

    ``state_dict`` and ``load_state_dict`` are those of the plain student, so the ``model`` entry of every
    checkpoint that any of Detectron2's tools writes loads in stock Detectron2 under the student's own
    config, and ``MODEL.WEIGHTS`` works as it does for the student. What the distiller has learnt is
    kept beside it by ``checkpoint_distiller(trainer)``.

    Args:
        student, teacher, distiller, levels, logits, extract: see ``DistillationModel``.
        log_period: iterations between two records of the metrics.
        vis_period: iterations between two pictures of the spatial masks in the event storage; 0 for none.
        input_format: of the images, as in INPUT.FORMAT; for the pictures.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: FrozenTeacher | None,
        distiller: Distiller | None,
        levels: Mapping[str, str],
        logits: nn.Module | None = None,
        extract: Extract = backbone_features,
        log_period: int = 20,
        vis_period: int = 0,
        input_format: str = "BGR",
    ) -> None:
        super().__init__(
            student=student, teacher=teacher, distiller=distiller, levels=levels, logits=logits, extract=extract
        )
        self.log_period = log_period
        self.vis_period, self.input_format = vis_period, input_format
        self._warned: set[str] = set()
        self._new = True  # the distiller, until it was loaded or used
        if distiller is not None:
            distiller.register_load_state_dict_post_hook(self._distiller_loaded)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(self._loaded_as_a_part)  # type: ignore[no-untyped-call]

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build everything; the student first, so that a seed gives it the same start under every method."""
        if cfg.DISTILL.STUDENT_META_ARCHITECTURE == META_ARCHITECTURE:
            raise ValueError(f"DISTILL.STUDENT_META_ARCHITECTURE is {META_ARCHITECTURE}; name the student's own")
        if cfg.DISTILL.STUDENT_META_ARCHITECTURE not in META_ARCH_REGISTRY:
            raise KeyError(
                f"no meta-architecture is called {cfg.DISTILL.STUDENT_META_ARCHITECTURE!r}; known: "
                f"{', '.join(sorted(name for name, _ in META_ARCH_REGISTRY))} (key: DISTILL.STUDENT_META_ARCHITECTURE)"
            )
        if cfg.DISTILL.INHERIT not in INHERIT:
            raise ValueError(f"DISTILL.INHERIT must be one of {INHERIT}, not {cfg.DISTILL.INHERIT!r}")
        taps = read_taps(cfg.DISTILL.TAPS, cfg.DISTILL.STUDENT_META_ARCHITECTURE)
        if cfg.DISTILL.LOG_PERIOD < 1:
            raise ValueError(f"DISTILL.LOG_PERIOD must be at least 1, not {cfg.DISTILL.LOG_PERIOD}")
        student = build_model(student_config(cfg))
        built: dict[str, Any] = {"student": student, "teacher": None, "distiller": None, "levels": {}}
        built |= {"log_period": cfg.DISTILL.LOG_PERIOD, "vis_period": cfg.VIS_PERIOD, "input_format": cfg.INPUT.FORMAT}
        if not cfg.DISTILL.METHOD and cfg.DISTILL.INHERIT == "never":
            logger.info("student alone: DISTILL.METHOD is empty and DISTILL.INHERIT is 'never'")
            return built
        detector, teacher_cfg = build_teacher(cfg)
        _inherit(cfg, student, teacher_cfg, detector)
        if cfg.DISTILL.METHOD:
            built |= _build_distillation(cfg, student, teacher_cfg, detector, taps)
        return built

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """As the student; in training the dict of losses has the distiller's too."""
        output = super().forward(batched_inputs)
        if self.training:
            iteration = get_event_storage().iter
            self.raise_if_not_finite(output, when=f"iteration {iteration}")
            if self.distiller is not None:
                self._warn_if_forgotten(iteration)
                if (iteration + 1) % self.log_period == 0:
                    self._log()
                if self.vis_period > 0 and iteration % self.vis_period == 0 and comm.is_main_process():
                    put_masks(self, batched_inputs, self.input_format)
        return output

    def _warn_if_forgotten(self, iteration: int) -> None:
        if self._new and iteration > 0:
            logger.warning(
                "training goes on at iteration %d with a NEW distiller: the checkpoint has none, or the trainer "
                "did not load it (call checkpoint_distiller(trainer) before resume_or_load)",
                iteration,
            )
        self._new = False

    def _distiller_loaded(self, _: nn.Module, incompatible: Any) -> None:
        self._new = any("distiller." in name for name in incompatible.missing_keys)

    def _loaded_as_a_part(self, _: nn.Module, incompatible: Any) -> None:
        """The state of the whole has no distiller, and that is no fault."""
        missing = incompatible.missing_keys
        missing[:] = [name for name in missing if "distiller." not in name]

    def _log(self) -> None:
        values = {name: float(value) for name, value in self.metrics().items()}
        get_event_storage().put_scalars(smoothing_hint=False, **{f"distill/{k}": v for k, v in values.items()})
        by_level: dict[str, list[str]] = {}
        for name, value in values.items():
            level, _, quantity = name.rpartition("/")
            by_level.setdefault(level, []).append(f"{quantity} {value:.4g}")
        logger.info("\n".join(f"{level or 'distill'}: {'  '.join(v)}" for level, v in by_level.items()))
        assert self.distiller is not None
        for place, warning in self.distiller.warnings().items():
            if place not in self._warned:
                self._warned.add(place)
                logger.warning("%s (under DISTILL.%s)", warning, type(self.distiller).__name__.upper())

    def __getattr__(self, name: str) -> Any:
        """What is not ours is the student's: Detectron2's tools look modules up by the names in ``state_dict``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "student":
                raise
            return getattr(self.student, name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The student's."""
        return self.student.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Into the student."""
        return self.student.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As a part of another module, whose ``load_state_dict`` does not call ours."""
        for name in [name for name in state_dict if name.startswith(prefix)]:
            state_dict[f"{prefix}student.{name.removeprefix(prefix)}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _build_distillation(
    cfg: CfgNode, student: nn.Module, teacher_cfg: CfgNode, detector: nn.Module, taps: Sequence[str]
) -> dict[str, Any]:
    method = DISTILLER_REGISTRY.get(cfg.DISTILL.METHOD)
    if cfg.DISTILL.METHOD.upper() not in cfg.DISTILL:
        raise KeyError(f"{cfg.DISTILL.METHOD} was registered after add_distillation_config(cfg); import it before")
    node = cfg.DISTILL[cfg.DISTILL.METHOD.upper()]
    arguments = {name: node[name.upper()] for name in method_arguments(method)}
    student_pyramid, teacher_pyramid = pyramid(student, taps), pyramid(detector, taps)
    _check_divisibility(cfg, student, detector)
    levels = match_levels(student_pyramid, teacher_pyramid, cfg.DISTILL.LEVELS)
    logger.info("distilling with %s on %s", cfg.DISTILL.METHOD, ", ".join(f"{s} <- {t}" for s, t in levels.items()))
    if not cfg.DISTILL.LEVELS and len(levels) < len(student_pyramid):
        logger.warning(
            "not every level of the student has a partner of its stride. student: %s; teacher: %s",
            describe(student_pyramid),
            describe(teacher_pyramid),
        )
    distiller = method(
        {s: student_pyramid[s] for s in levels}, {s: teacher_pyramid[t] for s, t in levels.items()}, **arguments
    )
    built: dict[str, Any] = {"distiller": distiller, "levels": levels}
    transform = _pixel_transform(cfg, teacher_cfg)
    if LOGITS in taps:
        teacher = FrozenTeacher(detector, transform, backbone_and_logits)
        return {**built, "teacher": teacher, "logits": logits_module(student), "extract": backbone_and_logits}
    return {**built, "teacher": FrozenTeacher(backbone_of(detector), transform)}  # the heads are let go


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


def _inherit(cfg: CfgNode, student: nn.Module, teacher_cfg: CfgNode, detector: nn.Module) -> None:
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
