#!/usr/bin/env python
"""What a distillation step costs: time and peak memory of the plain student, with the teacher, with the method.

    python tools/benchmark.py --config-file configs/acam_retinanet_r50_r101.yaml --size 320 480 MODEL.DEVICE cpu
    python tools/benchmark.py --config-file configs/acam_deeplabv3_r18_r101.yaml --size 512 1024 --batch 2 \\
        MODEL.DEVICE cpu
    python tools/benchmark.py --config-file configs/acam_retinanet_r50_r101.yaml --methods all -- MODEL.DEVICE cpu

``--methods`` measures other registered methods too, with their defaults. The variants take turns in one process,
so their ratios hold even where the machine's speed drifts; memory is measured in a process of its own per variant.
Weights are random and images are noise, which costs the same.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from acam_kd.core import DISTILLER_REGISTRY, Distiller, FeatureSpec, Targets, read_methods
from acam_kd.core.distiller import NOTHING_KNOWN
from acam_kd.core.features import Features
from acam_kd.d2 import add_distillation_config


class TeacherForward(Distiller):
    """Looks at nothing: the cost of the teacher alone."""

    def forward(self, student: Features, teacher: Features, targets: Targets = NOTHING_KNOWN) -> dict[str, Tensor]:
        """Return a loss of 0."""
        return {"loss_none": next(iter(student.values())).sum() * 0}


VARIANTS = ("plain student", "student + teacher forward", "mimicking", "the config's method")
METHODS = tuple(name for name, _ in DISTILLER_REGISTRY if name != "Mimic")


def build_variant(variant: str, args: argparse.Namespace) -> tuple[nn.Module, CfgNode]:
    """The model of a variant, in training mode, and its config.

    Raises:
        ValueError: it is a method that this student and teacher cannot be distilled with.
    """
    torch.manual_seed(0)
    cfg = get_cfg()
    add_distillation_config(cfg)
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(["DISTILL.TEACHER.WEIGHTS", "random", "DISTILL.LOG_PERIOD", "1000000000", *args.opts])
    cfg.DATASETS.TRAIN = ()  # noise; the names of its classes do not matter
    if variant == "plain student":
        cfg.DISTILL.METHOD, cfg.DISTILL.INHERIT = "", "never"
    elif variant in VARIANTS[1:3]:
        cfg.DISTILL.METHOD = "Mimic"
    elif variant not in VARIANTS:  # a method, on what it reads first
        cfg.DISTILL.METHOD, cfg.DISTILL.TAPS, cfg.DISTILL.LEVELS = variant, [], []
    model = build_model(cfg).train()
    if variant == "student + teacher forward":
        levels = dict.fromkeys(model.levels, FeatureSpec(channels=1, stride=1))
        model.distiller = TeacherForward(levels, levels)
    return model, cfg


def build(variant: str, args: argparse.Namespace) -> Callable[[], None]:
    """Build a variant; returns its training step, without the optimizer's."""
    model, cfg = build_variant(variant, args)
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    batch = [_sample(args.size[0], args.size[1], cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES) for _ in range(args.batch)]

    def step() -> None:
        losses = model(batch)
        model.zero_grad()
        sum(losses.values()).backward()
        if on_gpu:
            torch.cuda.synchronize()

    return step


def _sample(height: int, width: int, num_classes: int) -> dict[str, Any]:
    """An image of noise, two boxes, and labels of noise; every kind of model takes what it needs."""
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor([[10.0, 10.0, 100.0, 100.0], [50.0, 50.0, 200.0, 200.0]]))
    instances.gt_boxes.clip((height, width))
    instances.gt_classes = torch.tensor([0, 1])
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return {"image": image, "instances": instances, "sem_seg": torch.randint(0, num_classes, (height, width))}


def peak_memory(variant: str, args: argparse.Namespace, queue: Any) -> None:
    """Put the GiB that two steps of a variant reach: of the GPU where there is one, else of the process."""
    with EventStorage(0):
        step = build(variant, args)
        step()
        step()
    on_gpu = torch.cuda.is_available() and torch.cuda.max_memory_allocated()
    queue.put(on_gpu / 2**30 if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def _methods(text: str) -> str:
    try:
        return "all" if text == "all" else "+".join(read_methods(text))
    except (KeyError, ValueError) as error:
        raise argparse.ArgumentTypeError(error.args[0]) from None


def fitting(args: argparse.Namespace) -> list[str]:
    """The variants to measure: of all methods those that the pair can be distilled with, else those asked for."""
    if args.methods != ["all"]:
        return [*VARIANTS, *args.methods]
    found = list(VARIANTS)
    on_meta = argparse.Namespace(**{**vars(args), "opts": [*args.opts, "MODEL.DEVICE", "meta"]})
    for method in METHODS:
        try:
            with torch.device("meta"):  # nothing is computed there
                build_variant(method, on_meta)
        except ValueError as error:
            print(f"{method} is left out: {error}", file=sys.stderr)
        else:
            found.append(method)
    return found


def main() -> None:
    """Measure and print a Markdown table; the raw seconds go to --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--size", type=int, nargs=2, default=[320, 480], metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--methods",
        type=_methods,
        nargs="+",
        default=[],
        metavar="METHOD[+METHOD...]",
        help=f"measured beside them: {', '.join(METHODS)}; several at once, as PKD+KD; or all",
    )
    parser.add_argument("--json", help="file for the raw figures")
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs for the config")
    args = parser.parse_args()
    variants = fitting(args)
    memory = {}
    context = multiprocessing.get_context("spawn")
    for variant in variants:
        queue = context.Queue()
        process = context.Process(target=peak_memory, args=(variant, args, queue))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"measuring the memory of {variant!r} failed with exit code {process.exitcode}")
        memory[variant] = queue.get()
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    with EventStorage(0):
        steps = {variant: build(variant, args) for variant in variants}
        for repeat in range(args.repeats + 1):
            for variant, step in steps.items():
                start = time.perf_counter()
                step()
                if repeat:  # the first one warms up
                    seconds[variant].append(time.perf_counter() - start)
    median = {variant: statistics.median(values) for variant, values in seconds.items()}
    plain = variants[0]
    print(f"{args.config_file}, {args.size[0]}x{args.size[1]}, batch {args.batch}, torch {torch.__version__}")
    print("| step | seconds, median (range) | ratio | peak memory, GiB | ratio |\n|---|---|---|---|---|")
    for variant in variants:
        low, high = min(seconds[variant]), max(seconds[variant])
        print(
            f"| {variant} | {median[variant]:.3f} ({low:.3f}-{high:.3f}) | {median[variant] / median[plain]:.2f} | "
            f"{memory[variant]:.2f} | {memory[variant] / memory[plain]:.2f} |"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"seconds": seconds, "peak_memory_gib": memory}, file)


if __name__ == "__main__":
    main()
