"""Knowledge distillation for dense prediction: ACAM-KD, twelve other methods, and their controls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import nn

    from .core.adapter import Adapter
    from .core.distiller import Distiller
    from .core.errors import ConfigError, RunError
    from .core.registry import DISTILLER_REGISTRY, FUSION_REGISTRY, MASKING_REGISTRY
    from .core.targets import Targets
    from .core.teacher import Pixels

    Student = TypeVar("Student", bound=nn.Module)

__version__ = "0.2.0"

__all__ = [
    "DISTILLER_REGISTRY",
    "FUSION_REGISTRY",
    "MASKING_REGISTRY",
    "ConfigError",
    "Distiller",
    "Pixels",
    "RunError",
    "Targets",
    "distill",
    "learn_tokens",
]

LAZY = {
    "ConfigError": "core.errors",
    "DISTILLER_REGISTRY": "core.registry",
    "Distiller": "core.distiller",
    "FUSION_REGISTRY": "core.registry",
    "MASKING_REGISTRY": "core.registry",
    "Pixels": "core.teacher",
    "RunError": "core.errors",
    "Targets": "core.targets",
}
"""Name -> its module, which is imported when the name is used: ``import acam_kd`` alone does not import torch."""

ENGINES = {"detectron2": "d2", "torchvision": "tv"}
"""Framework -> the package whose ``adapter.adapt`` knows its models. A framework that was never imported has none."""


def __getattr__(name: str) -> Any:
    if name in LAZY:
        import_module("acam_kd.core")
        return getattr(import_module(f"acam_kd.{LAZY[name]}"), name)
    raise AttributeError(f"module 'acam_kd' has no attribute {name!r}")


def distill(
    student: Student,
    teacher: nn.Module | None,
    *,
    method: str | Distiller = "ACAMKD",
    student_levels: Mapping[str, str] | Sequence[str] | None = None,
    teacher_levels: Mapping[str, str] | None = None,
    targets: Callable[..., Targets] | None = None,
    period: int = 1,
    weight: str = "fixed",
    share: float = 0.5,
    warmup_iters: int = 0,
    stop_at: int = 0,
    teacher_precision: str = "",
    teacher_pixels: Pixels | None = None,
    inherit: str = "never",
    example_inputs: Any = None,
    student_class_names: Sequence[str] = (),
    teacher_class_names: Sequence[str] = (),
    class_map: Mapping[str, str] | None = None,
    **options: Any,
) -> Student:
    """Attach a distillation to a student: from now on its training losses include the method's.

    The student stays the object that it was: its class, parameter names, ``state_dict()``. It gets one more module,
    ``student.distillation``, which has the method's parameters, ``losses``, ``metrics()``, ``masks()``,
    ``state_dict()`` of what the method has learnt, and ``remove()``. Build the optimizer afterwards.

    Args:
        student: a detector, segmentor or classifier of Detectron2 or torchvision, or any module with levels by path. If
            it returns losses in training, they are added there, else they wait in ``student.distillation.losses``.
        teacher: a trained model on the student's device; it is run in evaluation mode and never changed. None for
            methods that learn from the student alone, as USKD.
        method: a name in ``DISTILLER_REGISTRY``, several as ``"PKD+KD"``, or a ready ``Distiller``.
        student_levels: level name -> path of a submodule, as ``{"c4": "layer3"}``; or, for models of a known kind, the
            names of the levels to distil. All that have a partner, if left out.
        teacher_levels: level name -> path of a submodule of the teacher.
        targets: a function of the arguments of the student's forward that returns ``Targets``, for methods that need
            boxes or labels; models of a known kind have one.
        period: distil every so many steps only.
        weight, share: ``"share"`` scales all losses so that their gradient at the tapped levels has a share of the
            task's; the losses must be added by the student itself. See ``core.weighting.WeightSchedule``.
        warmup_iters: the losses rise linearly to their full weight within so many steps.
        stop_at: the step from which nothing is distilled; 0 for never.
        teacher_precision: ``"float16"``, ``"bfloat16"`` or ``"float32"``; empty for the student's.
        teacher_pixels: how the teacher's images are normalised, as ``acam_kd.Pixels(mean, std, "RGB", white=1.0)``, for
            one that does not say it; models of Detectron2, torchvision and timm do.
        inherit: ``"always"`` or ``"auto"`` lets the student's neck and head start from the teacher's weights.
        example_inputs: a batch by which the levels of other modules are measured, or the arguments of their forward;
            noise of 1 x 3 x 224 x 224 if left out.
        student_class_names, teacher_class_names: the classes that the two predict, in order; then only the common ones
            are compared, whatever their order. Needed where predictions of other classes are distilled. The background
            of a class head may be left out, or named ``"__background__"``.
        class_map: student's name of a class -> the teacher's, for classes of different names.
        options: the method's hyper-parameters, as ``alpha=6.0``; of several, ``options={"PKD": {"alpha": 6.0}}``.

    Returns:
        The student.

    Raises:
        ConfigError: something does not fit; the message names the argument and what is allowed.

    Example:
        >>> import torch, torchvision, acam_kd
        >>> student, teacher = (torchvision.models.get_model(n) for n in ("resnet18", "resnet34"))
        >>> levels = {"c3": "layer2", "c4": "layer3"}
        >>> kind = dict(method="PKD", student_levels=levels, teacher_levels=levels, alpha=6.0)
        >>> student = acam_kd.distill(student, teacher, **kind)
        >>> logits = student(torch.randn(2, 3, 64, 64))
        >>> list(student.distillation.losses)
        ['loss_pkd_pearson']
        >>> student.distillation.remove()
    """
    from .core.assemble import Plan, assemble
    from .core.class_names import check_class_names
    from .core.pair_checks import check_models
    from .core.weighting import WeightSchedule

    check_models(student, student if teacher is None else teacher, alone=teacher is None)
    for name, given in (("student_levels", student_levels), ("teacher_levels", teacher_levels)):
        _check_levels(name, given, paths_only=name == "teacher_levels")
    levels = () if student_levels is None or isinstance(student_levels, Mapping) else tuple(student_levels)
    of_student = _adapter(student, "student", student_levels, example_inputs)
    of_teacher = None if teacher is None else _adapter_of_teacher(teacher, teacher_levels, example_inputs, of_student)
    for adapter, role, names in (
        (of_student, "student", student_class_names),
        (of_teacher, "teacher", teacher_class_names),
    ):
        if names and adapter is not None:
            adapter.class_names = check_class_names(f"{role}_class_names", names)
    if teacher_pixels is not None and of_teacher is not None:
        of_teacher.pixels = teacher_pixels
    plan = Plan(
        methods=_methods(method, options),
        levels=levels,
        inherit=inherit,
        schedule=WeightSchedule(weight, share, warmup=warmup_iters, stop_at=stop_at),
        period=period,
        teacher_precision=teacher_precision,
        class_map={} if class_map is None else class_map,
    )
    assemble(of_student, of_teacher, plan, targets=targets, kind=of_student.distillation)
    return student


def learn_tokens(
    teacher: nn.Module,
    batches: Iterable[tuple[Any, ...]],
    output: str,
    *,
    method: str = "MasKD",
    num_tokens: int = 0,
    iterations: int = 2000,
    learning_rate: float = 0.01,
) -> None:
    """Learn the tokens of MasKD or FreeKD on a teacher, and write them to a file for ``distill(..., tokens=output)``.

    The teacher's own losses teach the tokens; the teacher is the same afterwards. ``train_net.py`` and
    ``acam-kd train`` do this by themselves.

    Args:
        teacher: a trained model that in training returns a dict of losses, on its device. Its ``backbone`` returns a
            mapping from level name to (N, C, H, W).
        batches: the arguments of one call of the teacher each; at least as many as there are iterations.
        output: the file.
        method: ``"MasKD"`` or ``"FreeKD"``.
        num_tokens: per level; 0 for the papers' number.
        iterations, learning_rate: Adam's.

    Raises:
        ConfigError: teacher or arguments do not fit.
        RunError: a loss is not finite.

    Example:
        >>> import itertools, pathlib, tempfile, torch, torchvision, acam_kd
        >>> build = torchvision.models.detection.ssdlite320_mobilenet_v3_large
        >>> teacher, student = (build(num_classes=3, weights_backbone=None) for _ in range(2))
        >>> objects = {"boxes": torch.tensor([[20.0, 20.0, 80.0, 90.0]]), "labels": torch.tensor([1])}
        >>> batches = itertools.repeat(([torch.rand(3, 96, 96)], [objects]))
        >>> file = str(pathlib.Path(tempfile.mkdtemp()) / "tokens.pth")
        >>> acam_kd.learn_tokens(teacher, batches, file, iterations=2)
        >>> student = acam_kd.distill(student, teacher, method="MasKD", tokens=file)
    """
    from . import methods  # noqa: F401  (registers them)
    from .methods.parts.token_runs import TokenFile, learn_to_file

    wanted = TokenFile(output, method, num_tokens, iterations, learning_rate)
    learn_to_file(_adapter(teacher, "teacher", None, None), batches, wanted)


def _check_levels(argument: str, levels: Any, *, paths_only: bool) -> None:
    from .core.errors import ConfigError

    if isinstance(levels, Mapping):
        for level, path in levels.items():
            if not isinstance(path, str):
                raise ConfigError(argument, f"{level}: {path!r}", "the path of a submodule, as 'layer3' or 'blocks.11'")
    if levels is None or isinstance(levels, Mapping):
        return
    if paths_only or isinstance(levels, str):
        allowed = "level name -> path of a submodule" + ("" if paths_only else ", or a list of levels")
        raise ConfigError(argument, repr(levels), allowed)


def _adapter(model: nn.Module, role: str, levels: Any, example_inputs: Any) -> Adapter:
    """Choose the adapter: by paths if there are any, else the framework's, else that of a module with a backbone."""
    from .core.adapter import ModuleAdapter

    paths = levels if isinstance(levels, Mapping) and levels else None
    engines = [
        import_module(f"acam_kd.{engine}.adapter") for framework, engine in ENGINES.items() if framework in sys.modules
    ]
    if paths is None:
        for engine in engines:
            adapter: Adapter | None = engine.adapt(model, example_inputs)
            if adapter is not None:
                return adapter
    by_path = ModuleAdapter(model, paths, example_inputs=example_inputs, role=role)
    known = [pixels for engine in engines if (pixels := engine.pixels_of(model)) is not None]
    by_path.pixels = next(iter(known), by_path.pixels)
    return by_path


def _adapter_of_teacher(teacher: nn.Module, levels: Any, example_inputs: Any, student: Adapter) -> Adapter:
    """Measure a teacher by the student's example, else by the images that a part of the student was given there."""
    from .core.errors import ConfigError

    try:
        return _adapter(teacher, "teacher", levels, example_inputs)
    except ConfigError as error:
        if student.images is None or error.argument != "example_inputs":
            raise
    return _adapter(teacher, "teacher", levels, student.images)


def _methods(method: str | Distiller, options: dict[str, Any]) -> Any:
    """Return method name -> its hyper-parameters; a ready method stays as it is."""
    from . import methods  # noqa: F401  (registers them)
    from .core.distiller import Distiller
    from .core.errors import ConfigError
    from .core.options import read_methods

    if not isinstance(method, str):
        if not isinstance(method, Distiller):
            found = method.__name__ if isinstance(method, type) else repr(method)
            raise ConfigError("method", found, "a name, as 'PKD+KD', or an instance of Distiller")
        if options:
            raise ConfigError("options", ", ".join(options), "none with a ready method", "give them to its constructor")
        return method
    names = read_methods(method)
    if not names:
        raise ConfigError("method", method, "a name", "without a method there is nothing to attach")
    by_method: dict[str, Any] = {names[0]: options}
    if "options" in options or len(names) > 1:
        by_method = options.pop("options", {})
        if not isinstance(by_method, Mapping):
            raise ConfigError("options", repr(by_method), "method -> its hyper-parameters")
        if options:
            hint = f"write options={{'{names[0]}': {{...}}}}"
            raise ConfigError("options", ", ".join(options), "hyper-parameters by method", hint)
    if wrong := [name for name, own in by_method.items() if not isinstance(own, Mapping)]:
        raise ConfigError("options", f"{wrong[0]}: {by_method[wrong[0]]!r}", "method -> {hyper-parameter: value}")
    if wrong := [name for name in by_method if name not in names]:
        raise ConfigError("options", ", ".join(wrong), f"one of {', '.join(names)}")
    return {name: dict(by_method.get(name, {})) for name in names}
