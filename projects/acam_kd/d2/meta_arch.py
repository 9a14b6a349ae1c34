"""The meta-architecture: it reads the config, once, and attaches a distillation to the student described there."""

from __future__ import annotations

import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, SemanticSegmentor, build_model
from torch import nn

from ..core import DISTILLER_REGISTRY, ConfigError, Distillation, Plan, assemble, read_methods
from ..core.class_names import check_class_names, read_class_map
from ..core.options import all_arguments
from ..core.weighting import WeightSchedule
from .adapter import D2Adapter
from .config import META_ARCHITECTURE, student_config
from .former_keys import former_keys
from .teacher import build_teacher

__all__ = ["DistillationMetaArch"]

logger = logging.getLogger("detectron2.acam_kd")


class _OldUses(type):
    """Says in one line what to write instead of the uses that 0.1 had for the class."""

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
        """Refuse subclasses: there is nothing to override."""
        if bases:
            raise ConfigError(
                META_ARCHITECTURE, f"the subclass {name}", "a subclass of Distiller, or of Distillation",
                "build_model returns the student itself; see docs/migration.md",
            )  # fmt: skip
        return super().__new__(mcs, name, bases, namespace)

    def __instancecheck__(cls, instance: Any) -> bool:
        raise ConfigError(
            "DistillationMetaArch", "isinstance", "a look at the student",
            "write hasattr(model, 'distillation'): build_model returns the student itself; see docs/migration.md",
        )  # fmt: skip


@META_ARCH_REGISTRY.register()
class DistillationMetaArch(metaclass=_OldUses):
    """Builds a student and a frozen teacher from a config, attaches the distillation, and returns the student.

    It is the name in ``MODEL.META_ARCHITECTURE``. The result is an instance of DISTILL.STUDENT_META_ARCHITECTURE: its
    parameters, checkpoints and outputs are those of the plain student. Whatever the backbone returns, its FPN's maps,
    is intercepted there and given to the method; ``model.distillation`` is the rest.

    Args:
        cfg: the config, with the keys of ``add_distillation_config``.

    Raises:
        ConfigError: a value of the config, or student and teacher, do not fit.
    """

    def __new__(cls, cfg: CfgNode | None = None, **old: Any) -> nn.Module:  # type: ignore[misc]
        """Build the student."""
        if cfg is None:
            raise ConfigError(
                "DistillationMetaArch", ", ".join(old) or "nothing", "a config",
                "write acam_kd.distill(student, teacher, method=...) for models that are built already; see "
                "docs/migration.md",
            )  # fmt: skip
        return build_student(cfg)


def build_student(cfg: CfgNode) -> nn.Module:
    """Build everything; the student first, so that a seed gives it the same start under every method."""
    plan = read_plan(cfg)
    for line in former_keys(cfg, plan.methods):  # type: ignore[arg-type]
        logger.warning("%s", line)
    student = build_model(student_config(cfg))
    if not plan.methods and plan.inherit == "never":
        logger.info("student alone: DISTILL.METHOD is empty and DISTILL.INHERIT is 'never'")
        return _in_format(student, plan)
    teacher, teacher_cfg = build_teacher(cfg)
    of_student = _adapter(student, cfg)
    of_teacher = _adapter(teacher, teacher_cfg)
    if names := check_class_names("teacher_class_names", cfg.DISTILL.TEACHER.CLASS_NAMES):
        of_teacher.class_names = names
    engine = {"log_period": cfg.DISTILL.LOG_PERIOD, "vis_period": cfg.VIS_PERIOD}
    attached = assemble(of_student, of_teacher, plan, kind=of_student.distillation, **engine)
    if attached is not None:
        attached.input_format = cfg.INPUT.FORMAT  # type: ignore[assignment]
    return _in_format(student, plan)


def _in_format(student: nn.Module, plan: Plan) -> nn.Module:
    if plan.channels_last and not isinstance(getattr(student, "distillation", None), Distillation):
        student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return student


def read_plan(cfg: CfgNode) -> Plan:
    """Read the keys below DISTILL.

    Raises:
        ConfigError: a value is not allowed.
    """
    node = cfg.DISTILL
    name = node.STUDENT_META_ARCHITECTURE
    if name == META_ARCHITECTURE or name not in META_ARCH_REGISTRY:
        known = ", ".join(sorted(entry for entry, _ in META_ARCH_REGISTRY if entry != META_ARCHITECTURE))
        raise ConfigError(
            "DISTILL.STUDENT_META_ARCHITECTURE", name, f"the student's own: {known}",
            "FCOS and ViTDet have no YAML configs in Detectron2; see configs/lazy",
        )  # fmt: skip
    if node.LOG_PERIOD < 1:
        raise ConfigError("log_period", node.LOG_PERIOD, ">= 1")
    return Plan(
        methods={method: _arguments(cfg, method) for method in read_methods(node.METHOD)},
        levels=tuple(node.LEVELS),
        taps=node.TAPS if isinstance(node.TAPS, str) else tuple(node.TAPS),
        inherit=node.INHERIT,
        schedule=WeightSchedule(node.WEIGHT, node.SHARE, warmup=node.WARMUP_ITERS, stop_at=node.STOP_AT),
        period=node.PERIOD,
        teacher_precision=node.TEACHER.PRECISION,
        teacher_compile=node.TEACHER.COMPILE,
        channels_last=node.CHANNELS_LAST,
        class_map=read_class_map(node.CLASS_MAP),
    )


def _arguments(cfg: CfgNode, name: str) -> dict[str, Any]:
    """Return a method's settings, from its node; None for those that are open."""
    if name.upper() not in cfg.DISTILL:
        raise ConfigError(
            "method", name, "a method that was registered before add_distillation_config(cfg)",
            "import its module first: it was registered after add_distillation_config(cfg)",
        )  # fmt: skip
    node = cfg.DISTILL[name.upper()]
    method = DISTILLER_REGISTRY.get(name)
    known = {argument.upper(): argument for argument in (*all_arguments(name), *method.renamed)}
    if unknown := [key for key in node if key not in known]:  # assigned as an attribute, which yacs does not refuse
        raise ConfigError(f"DISTILL.{name.upper()}.{unknown[0]}", node[unknown[0]], f"one of {', '.join(known)}")
    return {known[key]: value for key, value in node.items()}


def _adapter(model: nn.Module, cfg: CfgNode) -> D2Adapter:
    """Return a model's adapter, with the names of the classes of its training data.

    They are known where the data is registered here and says them. More or fewer names than the model has classes are
    those of other data, as of the config that its own is based on.
    """
    adapter = D2Adapter(model, input_format=cfg.INPUT.FORMAT)
    kind = "stuff_classes" if isinstance(model, SemanticSegmentor) else "thing_classes"
    known = [dataset for dataset in cfg.DATASETS.TRAIN if dataset in MetadataCatalog.list()]
    names = list(MetadataCatalog.get(known[0]).get(kind, [])) if known else []
    if len(names) == adapter.num_classes:
        adapter.class_names = names
    return adapter
