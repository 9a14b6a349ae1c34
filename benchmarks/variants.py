"""The training steps of a config that are measured against each other, and the measuring of one of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import CNNBlockBase
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from acam_kd.core import DISTILLER_REGISTRY, ConfigError, Distiller, FeatureSpec, Targets
from acam_kd.core.distiller import NOTHING_KNOWN
from acam_kd.core.features import CLASSES, Features
from acam_kd.d2.config import add_distillation_config, merge
from acam_kd.methods.acam.fusion import CrossAttentionFusion

from .flops import count, distiller_flops
from .memory import OUT_OF_MEMORY, is_out_of_memory, peak_memory
from .timing import Clock, StepTimer

__all__ = [
    "FLOOR",
    "METHODS",
    "NAIVE",
    "PLAIN",
    "Setting",
    "Step",
    "Variant",
    "examine",
    "times",
    "variants",
]

METHODS = tuple(name for name, method in DISTILLER_REGISTRY if name != "Mimic" and not method.families)
PLAIN = "plain student"
FLOOR = "floor (mimicking)"
NAIVE = "naive attention"


@dataclass(frozen=True)
class Setting:
    """The setting of a measurement.

    Args:
        config_file: of a distillation.
        opts: KEY VALUE pairs for the config.
        batch: images.
        amp: the forward runs under autocast to float16, as with SOLVER.AMP.
    """

    config_file: str
    opts: tuple[str, ...] = ()
    batch: int = 1
    amp: bool = False


@dataclass(frozen=True)
class Variant:
    """One of the steps that are compared.

    Args:
        name: in the tables.
        opts: KEY VALUE pairs that make it out of the config.
        path: of the cross-attention; empty for its own choice.
        looks: else there is a teacher whose features nobody looks at.
    """

    name: str
    opts: tuple[Any, ...] = ()
    path: str = ""
    looks: bool = True

    def config(self, setting: Setting) -> CfgNode:
        """Return the config; students start alike in all variants, so that they find the same proposals."""
        cfg = get_cfg()
        add_distillation_config(cfg)
        quiet = ("DISTILL.TEACHER.WEIGHTS", "random", "DISTILL.LOG_PERIOD", "1000000000", "VIS_PERIOD", "0")
        merge(cfg, setting.config_file, [*quiet, *setting.opts, "DISTILL.INHERIT", "never", *self.opts])
        cfg.DATASETS.TRAIN = ()  # noise; the names of its classes do not matter
        return cfg

    def build(self, setting: Setting) -> nn.Module:
        """Build the model, in training mode.

        Raises:
            ConfigError: it is a method that this student and teacher cannot be distilled with.
        """
        torch.manual_seed(0)
        model: nn.Module = build_model(self.config(setting)).train()
        attached: Any = getattr(model, "distillation", None)
        for network in (model, attached.teacher.network if attached else None):
            _calm(network)
        if not self.looks:
            levels = dict.fromkeys(attached.levels, FeatureSpec(channels=1, stride=1))
            attached.method = TeacherForward(levels, levels)
        for fusion in _attentions(model) if self.path else ():
            fusion.path = self.path  # type: ignore[assignment]
        return model


class TeacherForward(Distiller):
    """A method that compares nothing: the cost of the teacher alone."""

    def forward(self, student: Features, teacher: Features, targets: Targets = NOTHING_KNOWN) -> dict[str, Tensor]:
        """Return a loss of 0."""
        return {"loss_none": next(iter(student.values())).sum() * 0}


def variants(setting: Setting, methods: Sequence[str], also: Sequence[Sequence[str]] = ()) -> list[Variant]:
    """List the variants that differ, for a config.

    Args:
        setting: the config and more.
        methods: others to measure beside them, with their defaults, on what they read first; ``["all"]`` for all but
            the config's own that this student and teacher can be distilled with. The others are printed.
        also: KEY VALUE pairs, each list of which makes one more variant of the config's method.

    Raises:
        ConfigError: one that was asked for does not fit, or cannot be measured in this way.
    """
    cfg = Variant("").config(setting)
    own = cfg.DISTILL.METHOD.replace("ACAMKD", "ACAM-KD")
    mimic: tuple[Any, ...] = ("DISTILL.METHOD", "Mimic")
    if CLASSES in cfg.DISTILL.TAPS:  # which it cannot read
        mimic += ("DISTILL.TAPS", [], "DISTILL.LEVELS", [])
    found = [
        Variant(PLAIN, ("DISTILL.METHOD", "")),
        Variant("student + teacher forward", mimic, looks=False),
        Variant(FLOOR, mimic),
    ]
    if "ACAM-KD" in own:
        masks = ("DISTILL.ACAMKD.SPATIAL_MASKING", "UniformMasking", "DISTILL.ACAMKD.CHANNEL_MASKING", "")
        found.append(Variant("uniform masks", ("DISTILL.METHOD", "ACAMKD", *masks)))
    if own not in ("", "Mimic"):
        model = _on_meta(Variant(own), setting)
        if _attentions(model) or own != "ACAM-KD" or any(True for _ in model.distillation.method.masking.parameters()):
            found.append(Variant(own))
        if _attentions(model):
            found += [Variant(f"{own}, {name}", path=path) for name, path in _paths(setting).items()]
    for pairs in also:
        if "DISTILL.PERIOD" in pairs[::2]:
            hint = "every step here is distilled: a period of k costs (method + (k - 1) plain) / k"
            raise ConfigError("also", "DISTILL.PERIOD", "other keys", hint)
        keys = (key.removeprefix("DISTILL.").removeprefix("ACAMKD.") for key in pairs[::2])
        changed = Variant(f"{own}, {', '.join(f'{k} {v}' for k, v in zip(keys, pairs[1::2]))}", tuple(pairs))
        _on_meta(changed, setting)
        found.append(changed)
    asked = methods if list(methods) != ["all"] else [name for name in METHODS if name != cfg.DISTILL.METHOD]
    for name in asked:
        variant = Variant(name, ("DISTILL.METHOD", name, "DISTILL.TAPS", [], "DISTILL.LEVELS", []))
        try:
            _on_meta(variant, setting)
        except ConfigError as error:
            if list(methods) != ["all"]:
                raise
            print(f"{name} is left out: {error}", file=sys.stderr)
        else:
            found.append(variant)
    return found


def _paths(setting: Setting) -> dict[str, str]:
    """Return the other ways to compute the cross-attention; in float32 its own choice is the summary."""
    return {"fused map": "map", **({"summary": "summary"} if setting.amp else {}), NAIVE: "materialized"}


def _on_meta(variant: Variant, setting: Setting) -> Any:
    with torch.device("meta"):  # nothing is computed there
        return variant.build(replace(setting, opts=(*setting.opts, "MODEL.DEVICE", "meta")))


@torch.no_grad()
def _calm(network: nn.Module | None) -> None:
    """Scale residual blocks down: random ones with frozen norms double the variance each and leave float16."""
    for block in network.modules() if network else ():
        if isinstance(block, CNNBlockBase):
            last = list(block.children())[-1]
            if isinstance(last, nn.Conv2d):
                last.weight.mul_(0.1)


def _attentions(model: nn.Module) -> list[CrossAttentionFusion]:
    return [module for module in model.modules() if isinstance(module, CrossAttentionFusion)]


class Step:
    """The training step of a variant, without the optimizer's, on images of noise.

    Args:
        variant, setting: what to build.
        size: height and width of the images, before padding.
    """

    def __init__(self, variant: Variant, setting: Setting, size: tuple[int, int]) -> None:
        self.model = variant.build(setting)
        cfg = variant.config(setting)
        torch.manual_seed(0)
        self.batch = [_sample(*size, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES) for _ in range(setting.batch)]
        self.on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
        self.timer = StepTimer(self.model, Clock(self.on_gpu), torch.float16 if setting.amp else None)

    def __call__(self, seed: int = 0) -> dict[str, float]:
        """Make a step and return part -> seconds. With one seed all variants do the same work: detectors sample."""
        torch.manual_seed(seed)
        return self.timer(self.batch)

    def counts(self) -> dict[str, Any]:
        """Count what the step computes, not how fast.

        Returns:
            ``levels``, those distilled -> height and width; ``flops``, of the ``step`` and, as ``distiller_flops`` has
            them, of the ``distiller``.
        """
        inputs: list[Any] = []
        attached: Any = getattr(self.model, "distillation", None)
        distiller = attached.method if attached else None
        hook = distiller.register_forward_pre_hook(lambda _, args: inputs.extend(args)) if distiller else None
        torch.manual_seed(0)
        total, _ = count(lambda: self.timer.forward(self.batch).backward())  # type: ignore[no-untyped-call]
        if distiller is None or hook is None:
            return {"levels": {}, "flops": {"step": total}}
        hook.remove()
        levels = {level: list(x.shape[2:]) for level, x in inputs[0].items()}
        with self.timer.precision():
            return {"levels": levels, "flops": {"step": total, "distiller": distiller_flops(distiller, *inputs)}}


def _sample(height: int, width: int, num_classes: int) -> dict[str, Any]:
    """Return an image of noise, two boxes, and labels of noise; every kind of model takes what it needs."""
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor([[10.0, 10.0, 100.0, 100.0], [50.0, 50.0, 200.0, 200.0]]))
    instances.gt_boxes.clip((height, width))
    instances.gt_classes = torch.tensor([0, 1])
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return {"image": image, "instances": instances, "sem_seg": torch.randint(0, num_classes, (height, width))}


def examine(variant: Variant, setting: Setting, size: tuple[int, int]) -> dict[str, Any]:
    """Measure peak memory of two steps, FLOPs, and the distilled levels; for a process of its own.

    Returns:
        ``peak_memory``, bytes, and what ``Step.counts`` does.
    """
    with EventStorage(0):
        step = Step(variant, setting, size)
        step()
        step()
        peak = peak_memory(step.on_gpu)
        return {"peak_memory": peak, **(_unless_out_of_memory(step.counts) or {})}


def times(chosen: Sequence[Variant], setting: Setting, size: tuple[int, int], repeats: int) -> dict[str, Any]:
    """Return the seconds of steps that take turns, to and fro, so that ratios hold where the machine's speed drifts.

    Returns:
        Variant's name -> ``parts``, the parts of each step, or ``failed``; a first round warms up.
    """
    found: dict[str, Any] = {variant.name: {"parts": []} for variant in chosen}
    with EventStorage(0):
        steps = {v.name: _unless_out_of_memory(partial(Step, v, setting, size)) for v in chosen}
        for repeat in range(repeats + 1):
            left = [name for name, step in steps.items() if step]
            for name in left if repeat % 2 else reversed(left):
                parts = _unless_out_of_memory(partial(steps[name], seed=repeat))
                if parts is None:
                    steps[name] = None
                    continue
                steps[name].model.zero_grad()  # room for the others
                found[name]["parts"] += [parts] if repeat else []
    for name in [name for name, step in steps.items() if not step]:
        found[name] = {"failed": OUT_OF_MEMORY}
    return found


def _unless_out_of_memory(function: Callable[[], Any]) -> Any:
    """Return what a function does; None if there was not enough memory."""
    try:
        return function()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    torch.cuda.empty_cache()
    return None
