"""The demo's runs with torchvision's detectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.coco import find_split
from ..demo import Plan, keep_masks
from .data import read_image
from .pictures import masks_of
from .run import Settings
from .training import train

__all__ = ["AT_ONCE", "DESCRIPTION", "USES_GPU", "run"]

AT_ONCE = 2
USES_GPU = True

TEACHER, STUDENT = "fcos_resnet18_fpn64_bn", "fcos_mobilenet_v3_small_fpn64_bn"
TEACHER_ITERATIONS, ITERATIONS = 250, 200
QUICK = 10
TEACHER_LEARNING_RATE, LEARNING_RATE = 0.001, 0.004
ALPHA = 10.0
SIZE = 160
DESCRIPTION = (
    f"The teacher is torchvision's FCOS on a ResNet-18, {TEACHER_ITERATIONS} iterations; the student FCOS on a small "
    f"MobileNetV3, {ITERATIONS} iterations; both from scratch, 8 images of {SIZE} x {SIZE} pixels a step."
)


def run(plan: Plan, folder: Path, *, data: Path, teacher: Path, seed: int, watched: Sequence[str]) -> None:
    """Train and evaluate one model; see ``demo.Engine``."""
    val = find_split(data, "val")
    is_teacher = plan.role == "teacher"
    iterations = QUICK if plan.quick else TEACHER_ITERATIONS if is_teacher else ITERATIONS
    settings = Settings(
        find_split(data, "train"),
        val,
        TEACHER if is_teacher else STUDENT,
        teacher=str(teacher) if plan.method or plan.inherit else "",
        method=plan.method,
        options=(f"alpha={ALPHA * plan.weight}", "features=raw") if plan.method else (),  # as docs/demo.md measured
        inherit="always" if plan.inherit else "never",
        size=SIZE,
        iterations=iterations,
        batch_size=8,
        optimizer="adamw",
        learning_rate=TEACHER_LEARNING_RATE if is_teacher else LEARNING_RATE,
        warmup=min(50, iterations // 2),
        seed=seed,
        workers=0,
        eval_period=iterations if plan.quick else iterations // 2,
        checkpoint_period=50,
    )
    images = [Path(val.image_root) / name for name in watched]
    train(settings, folder, resume=True, observers=[_observer(folder, images)])


def _observer(folder: Path, images: Sequence[Path]) -> Callable[[nn.Module, int], None]:
    """Make an observer that keeps the masks of some images each time that it is called."""

    def observe(student: nn.Module, step: int) -> None:
        device = next(student.parameters()).device
        for number, path in enumerate(images):
            image = read_image(str(path), name="demo").as_subclass(Tensor).to(device, torch.float32) / 255
            masks, strides = masks_of(student, image)
            if masks:
                keep_masks(folder, step, number, masks, strides)

    return observe
