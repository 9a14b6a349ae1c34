"""The sections of ``benchmarks.gpu`` about whole steps: their costs, every method, and the engine around them."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.engine.train_loop import AMPTrainer, SimpleTrainer
from detectron2.utils.events import EventStorage

from acam_kd.d2.checkpoint import check_after_backward, guard_gradients

from .gpu_case import Case, Scale
from .timing import PARTS
from .variants import FLOOR, METHODS, PLAIN, Setting, Step, Variant

__all__ = ["engines", "methods", "steps"]

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
ACAM = "DISTILL.ACAMKD."
UNIFORM = ("DISTILL.METHOD", "ACAMKD", f"{ACAM}SPATIAL_MASKING", "UniformMasking", f"{ACAM}CHANNEL_MASKING", "")
MIMIC = ("DISTILL.METHOD", "Mimic")


@dataclass(frozen=True)
class Pair:
    """A student and a teacher, and the batch on which they are measured.

    Args:
        name: in the tables.
        config: file of the distillation.
        size: height and width of the images.
        batch: images.
        extra: further variants.
        dear: the paths that are left out: a step takes seconds.
    """

    name: str
    config: str
    size: tuple[int, int]
    batch: int
    extra: tuple[Variant, ...] = ()
    dear: tuple[str, ...] = ()


CHANNELS_LAST = Variant("ACAM-KD, channels_last", ("DISTILL.CHANNELS_LAST", True))
EXACT_FLOAT32 = Variant("ACAM-KD, attention in float32", (f"{ACAM}ATTENTION_PRECISION", "float32"))
SPATIAL = Variant("ACAM-KD, spatial masks alone", (f"{ACAM}CHANNEL_MASKING", ""))
POOLED = (
    Variant("ACAM-KD, keys pooled", (f"{ACAM}MAX_POSITIONS", 30000)),
    Variant("ACAM-KD, all pooled", (f"{ACAM}MAX_POSITIONS", 30000, f"{ACAM}POOLING", "all")),
)
PAIRS = (
    Pair("RetinaNet R50 from R101, 800x1344", "acam_retinanet_r50_r101.yaml", (800, 1344), 2, (SPATIAL, CHANNELS_LAST)),
    Pair("Faster R-CNN R50 from R101 with P2, 800x1344", "acam_r50_r101.yaml", (800, 1344), 2, POOLED, ("summary",)),
    Pair("DeepLabV3 R18 from R101, logits, 512x1024", "acam_deeplabv3_r18_r101.yaml", (512, 1024), 4),
)
SMALL = (Pair("tiny RetinaNet", "quick_schedules/acam_instant.yaml", (96, 96), 2),)


def _setting(pair: Pair, scale: Scale, *, amp: bool) -> Setting:
    return Setting(str(CONFIGS / pair.config), ("MODEL.DEVICE", scale.device), pair.batch, amp)


def _variants(pair: Pair, *, amp: bool) -> list[Variant]:
    """List the variants of a pair; in float32 also the attention in float32, which half precision replaces."""
    paths = [path for path in ("map", "summary") if path not in pair.dear]
    found = [Variant(PLAIN, ("DISTILL.METHOD", "")), Variant(FLOOR, MIMIC), Variant("uniform masks", UNIFORM)]
    found += [Variant("ACAM-KD"), *(Variant(f"ACAM-KD, {path}", path=path) for path in paths), *pair.extra]
    return found if amp else [*found, EXACT_FLOAT32]


def steps(scale: Scale) -> Iterator[Case]:
    """List the variants of every pair, with AMP and in float32; what matters most comes first."""
    for amp, pair in itertools.product(scale.of((True, False), (False,)), scale.of(PAIRS, SMALL)):
        setting = _setting(pair, scale, amp=amp)
        about = {"pair": pair.name, "batch": pair.batch, "precision": "AMP float16" if amp else "float32"}
        for variant in _variants(pair, amp=amp):
            name = f"{pair.name}, {about['precision']}: {variant.name}"
            run = partial(_cost, scale, variant, setting, pair.size)
            yield Case(name, run, {**about, "variant": variant.name})


def _built(scale: Scale, variant: Variant, setting: Setting, size: tuple[int, int]) -> Step:
    """Build a step; on a GPU its random weights are made there, which is faster."""
    if not scale.on_gpu:
        return Step(variant, setting, size)
    try:
        with torch.device(scale.device):
            step = Step(variant, setting, size)
    except Exception:  # a part that does not like to be built there
        step = Step(variant, setting, size)
    step.batch = [{name: _on_cpu(value) for name, value in sample.items()} for sample in step.batch]
    return step


def _on_cpu(value: Any) -> Any:
    return value.to("cpu") if hasattr(value, "to") else value


def _cost(scale: Scale, variant: Variant, setting: Setting, size: tuple[int, int]) -> dict[str, Any]:
    """Measure time, parts and peak memory of one variant."""
    start = time.perf_counter()
    with EventStorage(0):
        step = _built(scale, variant, setting, size)
        built = time.perf_counter() - start
        first = sum(step(seed=0).values())
        warm = sum(step(seed=1).values())
        if scale.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        repeats = scale.of(3 if warm > 1 else 8, 1)
        parts = [step(seed=2 + repeat) for repeat in range(repeats)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if scale.on_gpu else None
    medians = {part: 1e3 * statistics.median(step[part] for step in parts) for part in PARTS}
    total = 1e3 * statistics.median(sum(step.values()) for step in parts)
    return {"ms": total, "parts": medians, "peak_gib": peak, "first": first, "built": built}


# Every method.

METHOD_PAIR = Pair("RetinaNet R50 from R101, 320x480", "acam_retinanet_r50_r101.yaml", (320, 480), 2)


def methods(scale: Scale) -> Iterator[Case]:
    """List every registered method with AMP and in float32."""
    pair = scale.of(METHOD_PAIR, SMALL[0])
    for name in ("Mimic", *METHODS) if scale.on_gpu else ("ACAMKD",):
        variant = Variant(name, ("DISTILL.METHOD", name, "DISTILL.TAPS", [], "DISTILL.LEVELS", []))
        for amp in (True, False) if scale.on_gpu else (False,):
            precision = "AMP float16" if amp else "float32"
            run = partial(_two_steps, scale, variant, _setting(pair, scale, amp=amp), pair.size)
            yield Case(f"{name}, {precision}", run, {"method": name, "precision": precision})


def _two_steps(scale: Scale, variant: Variant, setting: Setting, size: tuple[int, int]) -> dict[str, Any]:
    """Make two steps of an optimizer and look at losses and gradients."""
    with EventStorage(0):
        step = _built(scale, variant, setting, size)
        trained = {name: p for name, p in step.model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD(trained.values(), 1e-5)
        losses, bad, missing = [], set[str](), set[str]()
        for _ in range(2):
            optimizer.zero_grad()
            loss = step.timer.forward(step.batch)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(float(loss.detach()))
            missing |= {name for name, p in trained.items() if p.grad is None}
            bad |= {name for name, p in trained.items() if p.grad is not None and not bool(p.grad.isfinite().all())}
            optimizer.step()
    fine = not bad and not missing and all(map(math.isfinite, losses))
    return {"losses": losses, "not_finite": sorted(bad), "missing": sorted(missing), "within": fine}


# The engine.


def engines(scale: Scale) -> Iterator[Case]:
    """List the engines' loops against bare ones, for the floor and for ACAM-KD: Detectron2's trainer, then ours.

    Detectron2's has the project's guard. The torchvision engine needs Lightning, without which its rows fail.
    """
    pair = scale.of(PAIRS[0], SMALL[0])
    for variant, amp in itertools.product((Variant(FLOOR, MIMIC), Variant("ACAM-KD")), (True, False)):
        if amp and not scale.on_gpu:
            continue
        precision = "AMP float16" if amp else "float32"
        run = partial(_overhead, scale, variant, _setting(pair, scale, amp=amp), pair.size)
        name = f"Detectron2, {variant.name}, {precision}"
        yield Case(name, run, {"variant": variant.name, "precision": precision})
    from .gpu_loop import loops  # here, since it needs Lightning

    yield from loops(scale)


def _overhead(scale: Scale, variant: Variant, setting: Setting, size: tuple[int, int]) -> dict[str, Any]:
    """Time the same model and batch in a bare loop and in Detectron2's trainer, in turns."""
    step = _built(scale, variant, setting, size)
    model, count = step.model, scale.of(6, 3)
    trained = [p for p in model.parameters() if p.requires_grad]
    bare, guarded = (torch.optim.SGD(trained, 1e-7, momentum=0.9) for _ in range(2))
    guard_gradients(guarded, model, 35.0)
    loader = itertools.repeat(step.batch)
    if setting.amp:
        trainer = AMPTrainer(model, loader, guarded, gather_metric_period=20, precision=torch.float16)
    else:
        trainer = SimpleTrainer(model, loader, guarded, gather_metric_period=20)
    check_after_backward(trainer)
    scaler = torch.amp.GradScaler(scale.device, enabled=setting.amp)
    found: dict[str, list[float]] = {"bare": [], "engine": []}
    with EventStorage(0) as storage:
        for turn in range(4):
            for name, times in found.items():
                scale.wait()
                start = scale.clock()
                for _ in range(count):
                    if name == "bare":
                        _bare_step(step, bare, scaler)
                    else:
                        trainer.iter = storage.iter
                        trainer.run_step()
                        storage.step()
                scale.wait()
                if turn:
                    times.append((scale.clock() - start) / count)
    ms = {name: 1e3 * statistics.median(times) for name, times in found.items()}
    return {**ms, "ratio": statistics.median(e / b for e, b in zip(found["engine"], found["bare"]))}


def _bare_step(step: Step, optimizer: torch.optim.Optimizer, scaler: Any) -> None:
    loss = step.timer.forward(step.batch)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
