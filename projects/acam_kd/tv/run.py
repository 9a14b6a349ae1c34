"""The settings of a run, which are the options of ``acam-kd train``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..core import DISTILLER_REGISTRY, TAPS
from ..core.teacher import PRECISIONS
from ..core.trunk_weights import ORDERS
from ..core.weighting import WEIGHTS
from ..data.splits import Split
from ..fields import natural, option, positive, rate
from .card import read_card
from .defaults import (
    ADAMW_RATE,
    BATCH,
    CHECKPOINT_PERIOD,
    COCO_EPOCHS,
    COCO_STEPS,
    EVAL_PERIOD,
    MIN_PERIOD,
    MIN_STEPS,
    SGD_RATE,
)
from .loggers import LOGGERS
from .trunk import NORMS
from .values import amount, decay, devices, method

__all__ = ["Settings"]

METHODS = [name for name, _ in DISTILLER_REGISTRY]


@dataclass(frozen=True)
class Settings:
    """The settings that decide a run.

    Each field has its meaning in ``help``, as the command shows it. Empty and 0 stand for what is left out.

    Args:
        train_split, val_split: the files to train on and to evaluate on.
    """

    train_split: Split
    val_split: Split
    student: str = option(
        section="the student",
        metavar="NAME|FOLDER",
        help="a torchvision model, as fcos_resnet50_fpn, fasterrcnn_resnet18_fpn, ssdlite320_mobilenet_v3_large, "
        "ssdlite320_mobilenet_v2, deeplabv3_resnet50, mobile_deeplabv3_mobilenet_v2; on a network of "
        "timm fcos_timm:NETWORK_fpn; to classify images resnet18, resnet20, ...; or the folder of a finished run",
    )
    student_weights: str = option("", metavar="FILE|NAME", help="a state dict, or torchvision's, as DEFAULT")
    student_backbone_weights: str = option(
        "",
        metavar="FILE|NAME",
        help="of its trunk: a state dict, or torchvision's, as DEFAULT",
    )
    student_backbone_order: str = option(
        "RGB", choices=ORDERS, help="of the channels that this file was trained with; the student itself takes RGB"
    )
    freeze_stages: int | None = option(
        None,
        type=natural,
        metavar="N",
        help="frozen stages of its trunk, 0 to 5 from the stem. Left out, a detector with weights of its trunk has 2, "
        "or what torchvision freezes by itself",
    )
    freeze_norm: str = option(
        "",
        choices=NORMS,
        help="the batch norms of its trunk outside of frozen stages. Left out, those of a detector with weights of its "
        "trunk are frozen",
    )
    pixel_mean: tuple[float, ...] = option(
        (), action="store", nargs=3, type=float, metavar=("R", "G", "B"), help="of pixels in [0, 1]; else the model's"
    )
    pixel_std: tuple[float, ...] = option(
        (), action="store", nargs=3, type=float, metavar=("R", "G", "B"), help="likewise, their deviation"
    )
    size: int | None = option(
        None,
        type=positive,
        metavar="PIXELS",
        help="shorter side of the images; else the model's own; SSD's is fixed",
    )

    teacher: str = option(
        "",
        section="the teacher and the method",
        metavar="NAME|FOLDER",
        help="as --student; without it nothing is distilled",
    )
    teacher_weights: str = option("", metavar="FILE|NAME", help="as --student-weights")
    teacher_classes: int = option(
        0, type=natural, metavar="N", help="of a teacher's file, with the background, if not the data's"
    )
    teacher_class_names: tuple[str, ...] = option(
        (),
        action="store",
        nargs=None,
        metavar="NAMES|FILE",
        help="of a teacher's file, with commas between them or one per line, if not the data's; predictions are "
        "compared on the classes that both know",
    )
    class_map: tuple[str, ...] = option(
        (), metavar="NAME=NAME", help="classes that the teacher calls otherwise: the student's name and the teacher's"
    )
    method: str = option(
        "",
        type=method,
        metavar="METHOD[+METHOD...]",
        help=f"{', '.join(METHODS)}; none; or several at once, as PKD+KD. With a teacher the default is ACAMKD, of "
        "segmentation models CWD, of classifiers KD, without one none",
    )
    options: tuple[str, ...] = option(
        (),
        flag="--set",
        metavar="NAME=VALUE",
        help="the method's hyper-parameters, as alpha=2; of several methods as PKD.alpha=2",
    )
    inherit: str = option(
        "auto",
        choices=("auto", "always", "never"),
        help="start from the teacher's neck and head; auto: if both are detectors of one kind",
    )
    taps: tuple[str, ...] = option(
        (),
        choices=TAPS,
        help="what to distil: the backbone's features; the map of logits that a segmentation model predicts, before "
        "upsampling; the predicted classes of a detector. Default: what the method uses, and where it can use several "
        "the logits in segmentation, the backbone in detection",
    )
    levels: tuple[str, ...] = option((), help="the student's levels to distil; else the recipe's, or all that can be")
    weight: str = option(
        "fixed",
        choices=WEIGHTS,
        help="share: scale the method's losses so that their gradient has a share of the task's; not in any paper",
    )
    share: float = option(0.5, type=rate, metavar="S", help="with --weight share: that share")
    warmup_iters: int = option(
        0,
        flag="--distill-warmup",
        type=natural,
        metavar="STEPS",
        help="the method's losses rise so long",
    )
    stop_at: int = option(
        0, flag="--distill-stop", type=natural, metavar="STEP", help="nothing is distilled from there on; 0 for never"
    )

    augmentor: str = option(
        "",
        section="images that are made harder, for classification",
        choices=("hard", "hard-colour"),
        help="hard: turn, shift and scale images so that student and teacher disagree while the teacher stays sure; "
        "the student learns from these beside --method; hard-colour: change their colours, too. A reconstruction of "
        "HARD",
    )
    augmentor_ratio: int = option(5, type=positive, metavar="N", help="steps of the student for one of the augmentor")
    augmentor_thresholds: tuple[float, float] | None = option(
        None,
        nargs=2,
        type=float,
        metavar=("LOWER", "UPPER"),
        help="instead of a ratio: train the student until both disagree less, then the augmentor until they do more",
    )
    mixup: float = option(
        0.0, type=amount, metavar="ALPHA", help="blend each image with another, and their labels: Beta(ALPHA, ALPHA)"
    )
    cutmix: float = option(
        0.0, type=amount, metavar="ALPHA", help="paste a part of another image, likewise; of both one at random"
    )

    unlabelled: tuple[str, ...] = option(
        (),
        section="images without labels",
        metavar="FOLDER",
        help="the method's losses are made on these images too; methods that need boxes or labels are left out there",
    )
    unlabelled_batch: int = option(
        8, type=positive, metavar="N", help="such images a step, of all devices together, beside --batch-size"
    )
    unlabelled_weight: float = option(1.0, type=float, metavar="W", help="of their losses")
    unlabelled_start: int = option(0, type=natural, metavar="STEP", help="the first step with such images")
    unlabelled_keep_norms: bool = option(
        False, help="running statistics of the student's batch norms are those of labelled images alone"
    )
    pseudo_labels: float = option(
        0.0,
        type=rate,
        metavar="THRESHOLD",
        help="label these images by the teacher, once, and train on them as on labelled ones: boxes with at least "
        "this score, or each pixel's class, ignored below this probability; see pseudo_labels/ in --output",
    )

    distill_period: int = option(
        1,
        section="what makes distilling cheaper; the first two depart from the paper",
        type=positive,
        metavar="K",
        help="distil every K-th step only, the others are the student's alone; it pulls 1/K as hard",
    )
    teacher_precision: str = option("", choices=PRECISIONS[1:], help="of its forward pass; else the student's")
    teacher_compile: bool = option(False, help="its backbone by torch.compile: minutes at the start")
    no_teacher_check: bool = option(
        False, help="leave out the teacher's evaluation on 32 validation images before the first step"
    )
    channels_last: bool = option(False, help="the memory format of student, teacher and method")

    epochs: float = option(
        0.0,
        section="the run",
        type=rate,
        metavar="N",
        help=f"how often each image is seen. Default: {COCO_EPOCHS:.1f}, which are {COCO_STEPS} steps of {BATCH} on "
        f"COCO, but at least {MIN_STEPS} steps of {BATCH}",
    )
    iterations: int = option(0, type=positive, metavar="N", help="optimizer steps, instead of --epochs")
    batch_size: int = option(BATCH, type=positive, metavar="N", help="images a step, of all devices together")
    optimizer: str = option("sgd", choices=("sgd", "adamw"), help="of the student and of the method")
    learning_rate: float = option(
        0.0,
        flag="--lr",
        type=rate,
        help=f"after the warm-up. Default: for {BATCH} images a step {SGD_RATE} with sgd, in proportion to them, and "
        f"{ADAMW_RATE} with adamw, in proportion to their square root",
    )
    schedule: str = option("cosine", choices=("cosine", "poly"), help="of --lr, down to zero")
    warmup: int = option(1000, type=natural, metavar="STEPS", help="at most a quarter of the run")
    crop: tuple[int, int] | None = option(
        None,
        nargs=2,
        type=positive,
        metavar=("H", "W"),
        help="segmentation: train on parts of this size, cut out of the images at 0.5 to 2 times their size; else "
        "whole images",
    )
    ema: float = option(
        0.0,
        type=decay,
        metavar="DECAY",
        help="keep a moving average of the student's weights, as with 0.999, and evaluate, save and export that",
    )
    augment: str = option(
        "flip",
        choices=("flip", "crop", "none"),
        help="classification: random parts and flips of the images; parts alone, as for digits; or neither",
    )
    fraction: float = option(
        1.0, type=rate, metavar="F", help="classification: train on this part of each class's images, chosen by --seed"
    )
    leave_out: tuple[str, ...] = option(
        (), metavar="CLASS", help="classification: train without the images of these classes"
    )
    seed: int = option(0, type=natural, metavar="N", help="decides the start and the order of images; 0 if left out")
    eval_period: int = option(
        0,
        type=positive,
        metavar="STEPS",
        help=f"between two evaluations. Default: a quarter of the run, but {MIN_PERIOD} to {EVAL_PERIOD}",
    )
    checkpoint_period: int = option(
        0,
        type=positive,
        metavar="STEPS",
        help=f"between two checkpoints. Default: a tenth of the run, but {MIN_PERIOD} to {CHECKPOINT_PERIOD}; there is "
        "one before each evaluation too",
    )
    logger: tuple[str, ...] = option(
        (), choices=tuple(LOGGERS), help="more loggers, beside TensorBoard's file; Lightning's"
    )
    devices: int | str = option(
        1, type=devices, metavar="N|auto", help="GPUs, or processes on a CPU, per node; or auto"
    )
    num_nodes: int = option(1, type=positive, metavar="N", help="machines; torchrun or SLURM starts the command")
    accelerator: str = option("auto", help="Lightning's: auto, gpu, cpu, ...")
    precision: str = option("32-true", choices=("32-true", "bf16-mixed", "16-mixed"), help="Lightning's name")
    workers: int = option(2, type=natural, metavar="N", help="processes that read images, per device")

    @property
    def student_name(self) -> str:
        """The name of the student's model, also if ``student`` is a folder."""
        if not Path(self.student).is_dir():
            return self.student
        return read_card(self.student, argument="student")[0].name
