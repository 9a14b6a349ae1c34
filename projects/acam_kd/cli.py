"""The command ``acam-kd``: distil, evaluate and show torchvision models, with nothing but pip.

acam-kd train --data shapes --student fcos_resnet18_fpn --output output/teacher
acam-kd train --data shapes --student fcos_mobilenet_v3_small_fpn --teacher output/teacher --output output/acam
acam-kd eval --data shapes --student output/acam
acam-kd check shapes
acam-kd demo
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import acam_kd

from . import methods  # noqa: F401  (registers them)
from .cli_check import add_check_options, run_check
from .core import DISTILLER_REGISTRY, TAPS, read_methods
from .core.errors import ConfigError, one_line_errors
from .core.teacher import PRECISIONS
from .data.coco import CocoSplit
from .data.division import Division, divide
from .data.images import AUTO, RANGES
from .data.labels import read_names
from .data.splits import Split, find_any_split, find_whole, named_split, only_coco
from .files import to_json
from .tv.names import option

if TYPE_CHECKING:
    from .tv.run import Settings

__all__ = ["main", "train_settings"]

METHODS = [name for name, _ in DISTILLER_REGISTRY]
TOKENS_COMMAND = ConfigError(
    "command", "tokens", "train --method MasKD or FreeKD, which learns the tokens itself",
    "--set tokens=FILE keeps them in a file for other runs; see docs/migration.md",
)  # fmt: skip
"""The error for a command of version 0.1 that is gone."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; bad input ends it with one line and a non-zero status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments[:1]) == ["tokens"]:
        raise SystemExit(f"acam-kd: {TOKENS_COMMAND}")
    args = _parser().parse_args(arguments)
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # with several devices this runs once for each
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s", force=True)
    try:
        with one_line_errors("acam-kd", option):
            args.run(args)
    except KeyboardInterrupt as error:
        again = "the same command" if args.run is _demo else "the same command with --resume"
        end = f"; {again} {error.remedy}" if hasattr(error, "remedy") else ""
        print(f"acam-kd: {str(error) or 'interrupted'}{end}", file=sys.stderr)
        raise SystemExit(getattr(error, "status", 130)) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "acam-kd", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"acam-kd {acam_kd.__version__}")
    commands = parser.add_subparsers(required=True, metavar="train | eval | check | demo")
    defaults = argparse.ArgumentDefaultsHelpFormatter
    train = commands.add_parser("train", help="train a model, alone or from a teacher", formatter_class=defaults)
    _data_options(train, splits=("train", "val"))
    _model_options(train)
    _distillation_options(train)
    _run_options(train)
    train.set_defaults(run=_train)
    evaluate = commands.add_parser("eval", help="evaluate a model", formatter_class=defaults)
    _data_options(evaluate, splits=("val",))
    _model_options(evaluate)
    evaluate.add_argument("--batch-size", type=_positive, default=8, help="images at a time")
    evaluate.add_argument("--workers", type=_natural, default=2, help="processes that read images")
    evaluate.set_defaults(run=_evaluate)
    check = commands.add_parser("check", help="check a dataset, as every run does first", formatter_class=defaults)
    add_check_options(check)
    _data_options(check, splits=("train", "val"))
    check.set_defaults(run=run_check)
    demo = commands.add_parser(
        "demo", help="the whole story on drawn shapes, in a quarter of an hour", formatter_class=defaults
    )
    demo.add_argument("--engine", choices=("torchvision", "detectron2"), default="torchvision", help="who trains")
    demo.add_argument(
        "--seeds",
        type=_natural,
        nargs="+",
        action="extend",
        help="of the students; the teacher keeps its own; 0 if left out",
    )
    demo.add_argument(
        "--output",
        type=Path,
        help="folder; a demo found there is resumed; default: output/demo, or output/demo_detectron2",
    )
    demo.set_defaults(run=_demo)
    return parser


def _data_options(parser: argparse.ArgumentParser, *, splits: Sequence[str]) -> None:
    group = parser.add_argument_group(
        "data: --data, or the files of each split; in COCO's, YOLO's or Pascal VOC's format, or label PNGs"
    )
    group.add_argument(
        "--data",
        metavar="FOLDER|YAML",
        help="train.json + train/ and val.json + val/, or COCO's own layout; YOLO's, with a data.yaml; Pascal VOC's, "
        "with Annotations, JPEGImages, ImageSets; or, for segmentation, train/images, train/labels, val/images, "
        "val/labels with a label PNG of class numbers per image, where 255 is ignored",
    )
    for split in splits:
        group.add_argument(
            f"--{split}", nargs=2, metavar=("JSON|IMAGES", "IMAGES|LABELS"), help=f"the {split} split: json or folders"
        )
    group.add_argument(
        "--classes",
        default="",
        metavar="NAMES|FILE",
        help="of label PNGs, from number 0, with commas between them or one per line; else FOLDER/classes.txt",
    )
    group.add_argument(
        "--val-fraction", type=float, metavar="F", help="of a dataset without a split: validate on this part of it"
    )
    group.add_argument("--split-seed", type=_natural, default=0, metavar="N", help="decides which part")
    group.add_argument(
        "--group-by",
        default="",
        metavar="REGEX",
        help="images whose names agree in this stay together, as frames of one scene: '^([^_]+)_' for scene_0001.jpg",
    )
    group.add_argument(
        "--image-range",
        choices=RANGES,
        default=AUTO,
        help="of grey images of more than 8 bits: the values from black to white; auto: 16 bits are divided by 256, "
        "and other kinds are refused",
    )


def _model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the student")
    group.add_argument(
        "--student",
        required=True,
        metavar="NAME|FOLDER",
        help="a torchvision model, as fcos_resnet50_fpn, fasterrcnn_resnet18_fpn, ssdlite320_mobilenet_v3_large, "
        "deeplabv3_resnet50; or the folder of a finished run",
    )
    group.add_argument(
        "--student-weights", default="", metavar="FILE|NAME", help="a state dict, or torchvision's, as DEFAULT"
    )
    group.add_argument(
        "--size",
        type=_positive,
        metavar="PIXELS",
        help="shorter side of the images; else the model's own; SSD's is fixed",
    )


def _distillation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--student-backbone-weights", default="", metavar="NAME", help="torchvision's, as DEFAULT")
    group = parser.add_argument_group("the teacher and the method")
    group.add_argument(
        "--teacher", default="", metavar="NAME|FOLDER", help="as --student; without it nothing is distilled"
    )
    group.add_argument("--teacher-weights", default="", metavar="FILE|NAME", help="as --student-weights")
    group.add_argument(
        "--teacher-classes",
        type=_natural,
        default=0,
        help="of a teacher's file, with the background, if not the data's",
    )
    group.add_argument(
        "--teacher-class-names",
        default="",
        metavar="NAMES|FILE",
        help="of a teacher's file, with commas between them or one per line, if not the data's; predictions are "
        "compared on the classes that both know",
    )
    group.add_argument(
        "--class-map",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=NAME",
        help="classes that the teacher calls otherwise: the student's name and the teacher's",
    )
    group.add_argument(
        "--method",
        type=_method,
        metavar="METHOD[+METHOD...]",
        help=f"{', '.join(METHODS)}; none; or several at once, as PKD+KD. Default: ACAMKD with a teacher, none without",
    )
    group.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="the method's hyper-parameters, as alpha=2; of several methods as PKD.alpha=2",
    )
    group.add_argument(
        "--inherit",
        choices=("auto", "always", "never"),
        default="auto",
        help="start from the teacher's neck and head; auto: if both are detectors of one kind",
    )
    group.add_argument(
        "--taps",
        nargs="+",
        action="extend",
        choices=TAPS,
        default=[],
        help="what to distil: the backbone's features; the map of logits that a segmentation model predicts, before "
        "upsampling; the predicted classes of a detector. Default: what the method uses, and where it can use several "
        "the logits in segmentation, the backbone in detection",
    )
    group.add_argument(
        "--levels", nargs="+", action="extend", default=[], help="the student's levels to distil; else all that can be"
    )
    group = parser.add_argument_group("what makes distilling cheaper; the first two depart from the paper")
    group.add_argument(
        "--distill-period",
        type=_positive,
        default=1,
        metavar="K",
        help="distil every K-th step only, the others are the student's alone; it pulls 1/K as hard",
    )
    group.add_argument(
        "--teacher-precision", choices=PRECISIONS[1:], default="", help="of its forward pass; else the student's"
    )
    group.add_argument(
        "--teacher-compile", action="store_true", help="its backbone by torch.compile: minutes at the start"
    )
    group.add_argument(
        "--no-teacher-check",
        action="store_true",
        help="leave out the teacher's evaluation on 32 validation images before the first step",
    )
    group.add_argument("--channels-last", action="store_true", help="the memory format of student, teacher and method")


def _run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the run")
    group.add_argument("--output", type=Path, required=True, help="folder of the run")
    group.add_argument("--resume", action="store_true", help="resume the run in --output, if there is one")
    group.add_argument("--seed", type=_natural, default=0, help="decides the start and the order of the images")
    group.add_argument(
        "--crop",
        nargs=2,
        type=_positive,
        metavar=("H", "W"),
        help="segmentation: train on parts of this size, cut out of the images at 0.5 to 2 times their size; else "
        "whole images",
    )
    group.add_argument("--iterations", type=_positive, default=90000, help="optimizer steps")
    group.add_argument("--batch-size", type=_positive, default=16, help="images a step, of all devices together")
    group.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    group.add_argument("--lr", type=_rate, default=0.01, help="after the warm-up; for sgd and 16 images a step")
    group.add_argument("--schedule", choices=("cosine", "poly"), default="cosine", help="of --lr, down to zero")
    group.add_argument("--warmup", type=_natural, default=1000, help="steps; at most a quarter of the run")
    group.add_argument("--eval-period", type=_positive, default=5000, help="steps between two evaluations")
    group.add_argument("--checkpoint-period", type=_positive, default=1000, help="steps between two checkpoints")
    group.add_argument("--devices", type=_devices, default=1, help="GPUs, or processes on a CPU, per node; or auto")
    group.add_argument("--num-nodes", type=_positive, default=1, help="machines; torchrun or SLURM starts the command")
    group.add_argument("--accelerator", default="auto", help="Lightning's: auto, gpu, cpu, ...")
    group.add_argument("--precision", choices=("32-true", "bf16-mixed", "16-mixed"), default="32-true")
    group.add_argument("--workers", type=_natural, default=2, help="processes that read images, per device")


def _method(text: str) -> str:
    try:
        read_methods("" if text == "none" else text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(error.render(option).removeprefix("--method: ")) from None
    return text


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, found {text!r}") from None


def _positive(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {value}")
    return value


def _devices(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


def _natural(text: str) -> int:
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, found {value}")
    return value


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, found {text!r}") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive and finite, found {value}")
    return value


def _split(args: argparse.Namespace, split: str) -> Split:
    if args.val_fraction is not None:
        return _divided(args)[split]
    if args.group_by or args.split_seed:
        argument = "group_by" if args.group_by else "split_seed"
        raise ConfigError(argument, getattr(args, argument), "none without a fraction", "give {val_fraction}")
    files = getattr(args, split)
    if files:
        return named_split(files[0], files[1], args.classes, args.image_range)
    if not args.data:
        raise ConfigError(
            f"{split}_split", "nothing", "JSON IMAGES, or IMAGES LABELS", "or --data FOLDER with both splits"
        )
    return find_any_split(args.data, split, args.classes, args.image_range)


def _names(text: str) -> tuple[str, ...]:
    return tuple(read_names(text, "teacher_class_names")) if text else ()


def _divided(args: argparse.Namespace) -> dict[str, CocoSplit]:
    """Divide the data without a split, once for all parts that a command uses."""
    if not hasattr(args, "parts"):
        named: list[list[str]] = [files for split in ("train", "val") if (files := getattr(args, split, None))]
        if bool(args.data) + len(named) != 1:
            found = "a fraction without data" if not named else "a fraction of two datasets"
            raise ConfigError("val_fraction", found, "one dataset", "give one of {data}, {train_split}, {val_split}")
        whole = (
            only_coco(named_split(named[0][0], named[0][1], args.classes, args.image_range))
            if named
            else find_whole(args.data, args.classes, args.image_range)
        )
        division = Division(args.val_fraction, args.split_seed, args.group_by)
        args.parts = divide(whole, division, args.output if args.run is _train else None)
    parts: dict[str, CocoSplit] = args.parts
    return parts


def _train(args: argparse.Namespace) -> None:
    from .tv.training import train

    result = train(_settings(args), args.output, resume=args.resume)
    if result is not None:  # else another process of this run has it
        _print_metrics(result["metrics"])
        print(f"the student: {args.output / 'student.pth'}")


def train_settings(arguments: Sequence[str]) -> Settings:
    """Return the settings of ``acam-kd train`` with these arguments."""
    return _settings(_parser().parse_args(["train", *arguments]))


def _settings(args: argparse.Namespace) -> Settings:
    from .tv.run import Settings

    method = args.method or ("ACAMKD" if args.teacher else "none")
    return Settings(
        train_split=_split(args, "train"),
        val_split=_split(args, "val"),
        student=args.student,
        student_weights=args.student_weights,
        student_backbone_weights=args.student_backbone_weights,
        teacher=args.teacher,
        teacher_weights=args.teacher_weights,
        teacher_classes=args.teacher_classes,
        teacher_class_names=_names(args.teacher_class_names),
        class_map=tuple(args.class_map),
        method="" if method == "none" else method,
        options=tuple(args.set),
        inherit=args.inherit,
        levels=tuple(args.levels),
        taps=tuple(args.taps),
        distill_period=args.distill_period,
        teacher_precision=args.teacher_precision,
        teacher_compile=args.teacher_compile,
        no_teacher_check=args.no_teacher_check,
        channels_last=args.channels_last,
        size=args.size,
        crop=tuple(args.crop) if args.crop else None,
        iterations=args.iterations,
        batch_size=args.batch_size,
        optimizer=args.optimizer,
        learning_rate=args.lr,
        schedule=args.schedule,
        warmup=args.warmup,
        seed=args.seed,
        precision=args.precision,
        accelerator=args.accelerator,
        devices=args.devices,
        num_nodes=args.num_nodes,
        workers=args.workers,
        eval_period=args.eval_period,
        checkpoint_period=args.checkpoint_period,
    )


def _evaluate(args: argparse.Namespace) -> None:
    from .tv.build import evaluate

    found = evaluate(
        args.student,
        args.student_weights,
        _split(args, "val"),
        size=args.size,
        batch_size=args.batch_size,
        workers=args.workers,
    )
    _print_metrics(found)


def _print_metrics(metrics: dict[str, Any]) -> None:
    print(to_json({name: value if value is None else round(value, 2) for name, value in metrics.items()}))


def _demo(args: argparse.Namespace) -> None:
    from .demo import demo

    suffix = "" if args.engine == "torchvision" else f"_{args.engine}"
    demo(args.output or Path(f"output/demo{suffix}"), engine=args.engine, seeds=args.seeds or [0])


if __name__ == "__main__":
    main()
