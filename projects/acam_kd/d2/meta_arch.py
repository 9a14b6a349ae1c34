"""The meta-architecture: reads the config, once, and builds student, teacher and method from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from ..core import ClassHead, DistillationModel, Distiller, FrozenTeacher, Targets, read_methods
from ..core.model import backbone_features, nothing_known
from ..core.teacher import Extract
from .build import build_distillation, inherit_from_teacher
from .config import INHERIT, META_ARCHITECTURE, student_config
from .taps import read_taps
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
        student, teacher, distiller, levels, logits, class_head, read_targets, extract, period: see
            ``DistillationModel``; its ``iteration`` is the trainer's, also after a resumption.
        channels_last: the memory format of everything.
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
        class_head: ClassHead | None = None,
        read_targets: Callable[..., Targets] = nothing_known,
        extract: Extract = backbone_features,
        period: int = 1,
        channels_last: bool = False,
        log_period: int = 20,
        vis_period: int = 0,
        input_format: str = "BGR",
    ) -> None:
        super().__init__(
            student=student,
            teacher=teacher,
            distiller=distiller,
            levels=levels,
            logits=logits,
            class_head=class_head,
            read_targets=read_targets,
            extract=extract,
            period=period,
        )
        if channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.log_period = log_period
        self.vis_period, self.input_format = vis_period, input_format
        self._warned: set[tuple[str, str]] = set()
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
        methods = read_methods(cfg.DISTILL.METHOD)
        taps = read_taps(cfg.DISTILL.TAPS, methods, cfg.DISTILL.STUDENT_META_ARCHITECTURE)
        if cfg.DISTILL.LOG_PERIOD < 1:
            raise ValueError(f"DISTILL.LOG_PERIOD must be at least 1, not {cfg.DISTILL.LOG_PERIOD}")
        student = build_model(student_config(cfg))
        built: dict[str, Any] = {"student": student, "teacher": None, "distiller": None, "levels": {}}
        built |= {"log_period": cfg.DISTILL.LOG_PERIOD, "vis_period": cfg.VIS_PERIOD, "input_format": cfg.INPUT.FORMAT}
        built |= {"period": cfg.DISTILL.PERIOD, "channels_last": cfg.DISTILL.CHANNELS_LAST}
        if not cfg.DISTILL.METHOD and cfg.DISTILL.INHERIT == "never":
            logger.info("student alone: DISTILL.METHOD is empty and DISTILL.INHERIT is 'never'")
            return built
        detector, teacher_cfg = build_teacher(cfg)
        inherit_from_teacher(cfg, student, teacher_cfg, detector)
        if methods:
            built |= build_distillation(cfg, methods, student, teacher_cfg, detector, taps)
        return built

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """As the student; in training the dict of losses has the distiller's too."""
        if self.training:
            self.iteration = iteration = get_event_storage().iter
        output = super().forward(batched_inputs)
        if self.training:
            self.raise_if_not_finite(output, when=f"iteration {iteration}")
            if self.distiller is not None:
                self._warn_if_forgotten(iteration)
                if self.last_of(self.log_period):
                    self._log()
                if self.vis_period > 0 and self.first_of(self.vis_period) and comm.is_main_process():
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
        for method in self.distiller.parts():
            name = type(method).__name__.upper()
            for place, warning in method.warnings().items():
                if (name, place) not in self._warned:
                    self._warned.add((name, place))
                    logger.warning("%s (under DISTILL.%s)", warning, name)

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
