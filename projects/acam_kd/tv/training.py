"""One training run with torchvision models: Lightning's Trainer has the loop, the devices and the precision."""

from __future__ import annotations

import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..core import DistillationModel, clip_gradients
from .data import CocoImages, Stream, evaluation_loader, training_loader
from .distillation import build_distillation, load_weights, parse_options
from .evaluation import build_evaluator
from .models import build_model, is_segmentation, plain
from .run import Card, RunFolder, Settings, read_card

__all__ = ["evaluate", "load_model", "train"]

logger = logging.getLogger("acam_kd")

LOG_PERIOD = 20
MAX_GRADIENT_NORM = 35.0
Moment = Callable[[DistillationModel, int], None]
"""Called with the model and the number of steps done."""


class Training(lightning.LightningModule):
    """The training step, the schedule and the evaluation of one run.

    Args:
        model: student, teacher and method.
        settings: of the run.
        validation: the images to evaluate on.
        stream: the order of the training images; moved forward when a run is resumed.
        folder: gets metrics and checkpoints.
        observers: called before the first step and at every evaluation.
    """

    def __init__(
        self,
        model: DistillationModel,
        settings: Settings,
        *,
        validation: CocoImages,
        stream: Stream,
        folder: RunFolder,
        observers: Sequence[Moment] = (),
    ) -> None:
        super().__init__()
        self.model, self.settings, self.validation = model, settings, validation
        self.stream, self.folder, self.observers = stream, folder, observers
        self.evaluator = build_evaluator(validation)
        self.evaluated_at, self.found = -1, dict[str, float]()
        self.seconds, self._started = 0.0, time.perf_counter()
        self._warned: set[str] = set()

    # One step.

    def training_step(self, batch: tuple[list[Tensor], list[dict[str, Any]]], _: int) -> Tensor:
        """The sum of the student's and the distiller's losses."""
        losses = self.model(*batch)
        self.model.raise_if_not_finite(losses, when=f"iteration {self.global_step}")
        if (self.global_step + 1) % LOG_PERIOD == 0:
            self._log_losses(losses)
        return torch.stack([loss.float() for loss in losses.values()]).sum()

    def _log_losses(self, losses: dict[str, Tensor]) -> None:
        values = {name: float(loss.detach()) for name, loss in losses.items()}
        values = {"loss": sum(values.values()), **values}
        step, settings = self.global_step + 1, self.settings
        self.folder.log(step, values)
        self.folder.log(step, {f"distill/{name}": float(value) for name, value in self.model.metrics().items()})
        if isinstance(self.logger, TensorBoardLogger):
            self.logger.log_metrics(values, step)
        parts = "  ".join(f"{name.removeprefix('loss_')} {value:.3g}" for name, value in values.items())
        logger.info("step %d/%d  %s  (%.0f s)", step, settings.iterations, parts, self._time())
        if self.model.distiller is not None:
            for place, warning in self.model.distiller.warnings().items():
                if place not in self._warned:
                    self._warned.add(place)
                    logger.warning("%s (option: --set)", warning)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip, and stop before a bad gradient reaches the weights; float16's scaler skips such steps itself."""
        if self.settings.precision != "16-mixed":
            clip_gradients(self, MAX_GRADIENT_NORM, when=f"iteration {self.global_step}")

    def configure_optimizers(self) -> Any:
        """SGD or AdamW; a linear warm-up, then a cosine down to zero."""
        settings = self.settings
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer
        if settings.optimizer == "adamw":
            optimizer = torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=0.05)
        else:
            optimizer = torch.optim.SGD(parameters, settings.learning_rate, momentum=0.9, weight_decay=1e-4)
        warmup = min(settings.warmup, settings.iterations // 4)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.iterations - warmup)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Evaluation; every process has its share of the images.

    def on_train_start(self) -> None:
        """Observe the student as it starts."""
        self._started = time.perf_counter()
        if self.global_step == 0:
            self._observe(0)

    def validation_step(self, batch: tuple[list[Tensor], list[dict[str, Any]]], _: int) -> None:
        """Collect a batch's outputs."""
        images, targets = batch
        self.evaluator.add(self.model(images), targets)

    def on_validation_epoch_end(self) -> None:
        """Metrics of all processes' outputs."""
        shares = [self.evaluator.results]
        if self.trainer.world_size > 1:
            shares = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(shares, self.evaluator.results)
        self.evaluator.results = [result for share in shares for result in share]
        self.found = self.evaluator.metrics()
        if self.trainer.is_global_zero:
            self.folder.write_predictions(self.evaluator.results)
        self.evaluator.results = []
        self.evaluated_at = self.global_step
        self.folder.log(self.global_step, self.found)
        if isinstance(self.logger, TensorBoardLogger):
            self.logger.log_metrics(self.found, self.global_step)
        shown = "  ".join(f"{name} {value:.2f}" for name, value in self.found.items())
        logger.info("step %d/%d  %s", self.global_step, self.settings.iterations, shown)

    def on_validation_end(self) -> None:
        """Observe, where the masks are in this moment."""
        self._observe(self.global_step)

    def _observe(self, step: int) -> None:
        if self.trainer.is_global_zero:
            for observer in self.observers:
                observer(self.model, step)

    # Checkpoints.

    def on_train_batch_end(self, *_: Any) -> None:
        """Save what a resumed run needs."""
        if self.global_step % self.settings.checkpoint_period == 0:
            self.trainer.save_checkpoint(self.folder.checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's checkpoint, and the random state of the first process and the time so far."""
        checkpoint["rng"] = torch.get_rng_state()
        if torch.cuda.is_available():
            checkpoint["rng_cuda"] = torch.cuda.get_rng_state()
        checkpoint["seconds"] = self._time()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on at the same image, with the same random numbers."""
        self.stream.start = checkpoint["global_step"]
        self.seconds = checkpoint["seconds"]
        self._rng = checkpoint["rng"], checkpoint.get("rng_cuda")

    def on_train_batch_start(self, *_: Any) -> None:
        """Restore the random state, once everything else is set up."""
        cpu, cuda = self.__dict__.pop("_rng", (None, None))
        if cpu is not None and self.trainer.world_size == 1:
            torch.set_rng_state(cpu)
            if cuda is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(cuda)

    def _time(self) -> float:
        return self.seconds + time.perf_counter() - self._started


def load_model(
    name: str, weights: str, *, num_classes: int | None, size: int | None, role: str, backbone_weights: str = ""
) -> tuple[nn.Module, Card | None]:
    """A model by the folder of a finished run, or by its name; see ``Settings`` for both.

    Returns:
        The model, and what its run's folder says about it.
    """
    if Path(name).is_dir():
        card, path = read_card(name)
        model = build_model(card.name, num_classes=card.num_classes, size=size or card.size)
        load_weights(model, weights or str(path), role=role)
        return model, card
    is_file = bool(weights) and (Path(weights).exists() or not weights.replace("_", "").isalnum())
    model = build_model(
        name,
        num_classes=num_classes,
        size=size,
        weights=None if is_file else weights or None,
        backbone_weights=backbone_weights or None,
    )
    if is_file:
        load_weights(model, weights, role=role)
    return model, None


def _build(settings: Settings, data: CocoImages) -> DistillationModel:
    options = parse_options(settings.method, settings.options)
    student, _ = load_model(
        settings.student,
        settings.student_weights,
        num_classes=data.num_classes,
        size=settings.size,
        role="student",
        backbone_weights=settings.student_backbone_weights,
    )
    teacher = None
    if settings.teacher and (settings.method or settings.inherit != "never"):
        if not settings.teacher_weights and not Path(settings.teacher).is_dir():
            raise ValueError(
                f"the teacher {settings.teacher} has no weights: give the folder of a finished run, or a name with "
                "--teacher-weights FILE or DEFAULT"
            )
        with torch.random.fork_rng(devices=[]):  # what the teacher draws for its start must not move the student
            classes = settings.teacher_classes or data.num_classes
            teacher, _ = load_model(
                settings.teacher, settings.teacher_weights, num_classes=classes, size=None, role="teacher"
            )
    return build_distillation(
        student,
        teacher,
        method=settings.method,
        options=options,
        inheritance=settings.inherit,
        levels=settings.levels,
    )


def train(settings: Settings, output: str | Path, *, resume: bool = False, observers: Sequence[Moment] = ()) -> Any:
    """Train, evaluate, and leave the student in ``output``.

    Args:
        settings: of the run.
        output: folder; ``run.RunFolder`` lists what will be there.
        resume: go on with what is in ``output``, from its last checkpoint; a finished run is left alone.
        observers: see ``Training``.

    Returns:
        The content of ``result.json``.

    Raises:
        ValueError, KeyError, FileNotFoundError: what the user can mend, in one line.
        FloatingPointError: a loss or gradient is not finite.
    """
    folder = RunFolder(output)
    folder.check(settings, resume=resume)
    if resume and (result := folder.result()) is not None:
        logger.info("%s is complete already", folder.path)
        return result
    semantic = is_segmentation(settings.student_name)
    masks = settings.student_name.startswith("maskrcnn")
    training = CocoImages(settings.train_split, semantic=semantic, masks=masks, name="training data")
    validation = CocoImages(settings.val_split, semantic=semantic, masks=masks, name="validation data")
    _check_classes(training, validation)
    lightning.seed_everything(settings.seed, verbose=False)
    model = _build(settings, training)
    trainer = _trainer(settings, folder)
    stream = Stream(
        len(training),
        batch_size=settings.batch_size,
        batches=settings.iterations,
        seed=settings.seed,
        rank=trainer.global_rank,
        world=trainer.world_size,
    )
    folder.start(settings)
    task = Training(model, settings, validation=validation, stream=stream, folder=folder, observers=observers)
    loaders: tuple[DataLoader[Any], DataLoader[Any]] = (
        training_loader(training, stream, workers=settings.workers),
        _evaluation_loader(validation, settings, trainer),
    )
    checkpoint = folder.checkpoint if resume and folder.checkpoint.is_file() else None
    try:
        trainer.fit(task, *loaders, ckpt_path=checkpoint, weights_only=False)
    except SystemExit:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from None
    if task.evaluated_at != settings.iterations:
        trainer.validate(task, loaders[1], verbose=False)
    card = Card.of(settings, training)
    seconds = task._time()
    if not trainer.is_global_zero:
        return None
    return folder.finish(card, plain(model.student), settings, metrics=task.found, seconds=seconds)


def evaluate(
    student: str, weights: str, split: Any, *, size: int | None = None, batch_size: int = 8, workers: int = 0
) -> dict[str, float]:
    """Evaluate a finished run's student, or a model by its name and weights, on a dataset."""
    name = read_card(student)[0].name if Path(student).is_dir() else student
    data = CocoImages(split, semantic=is_segmentation(name), masks=name.startswith("maskrcnn"))
    if not weights and not Path(student).is_dir():
        raise ValueError(f"{student} has no weights (option: --student-weights; or give the folder of a finished run)")
    model, card = load_model(student, weights, num_classes=data.num_classes, size=size, role="student")
    if card and card.categories != data.categories:
        raise ValueError(f"{student} knows {card.categories}, the data has {data.categories}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    evaluator = build_evaluator(data)
    with torch.inference_mode():
        for images, targets in evaluation_loader(data, batch_size=batch_size, workers=workers):
            evaluator.add(model([image.to(device) for image in images]), targets)
    return evaluator.metrics()


def _check_classes(training: CocoImages, validation: CocoImages) -> None:
    if training.categories != validation.categories:
        raise ValueError(
            f"training data has the categories {training.categories}, validation data {validation.categories}"
        )


def _evaluation_loader(data: CocoImages, settings: Settings, trainer: lightning.Trainer) -> DataLoader[Any]:
    world = trainer.world_size
    size = max(1, settings.batch_size // world)
    return evaluation_loader(data, batch_size=size, workers=settings.workers, rank=trainer.global_rank, world=world)


def _trainer(settings: Settings, folder: RunFolder) -> lightning.Trainer:
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    return lightning.Trainer(
        max_steps=settings.iterations,
        val_check_interval=settings.eval_period,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        precision=settings.precision,  # type: ignore[arg-type]
        accelerator=settings.accelerator,
        devices=settings.devices,
        strategy="ddp" if settings.devices > 1 else "auto",
        use_distributed_sampler=False,
        logger=TensorBoardLogger(str(folder.path), name="", version="tensorboard"),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
    )
