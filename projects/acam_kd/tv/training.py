"""One training run with torchvision models: Lightning's Trainer has the loop, the devices and the precision."""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..core import ConfigError, Distillation, RunError, clip_gradients
from ..core.outputs import non_finite
from . import token_learning
from .build import build
from .data import Images, Stream, evaluation_loader, training_loader
from .evaluation import build_evaluator
from .labels import load_data
from .models import plain
from .names import option
from .run import Card, RunFolder, Settings

__all__ = ["Training", "train"]

logger = logging.getLogger("acam_kd")

LOG_PERIOD = 20
MAX_GRADIENT_NORM = 35.0
POWER = 0.9
"""The exponent of the polynomial schedule, as in DeepLab's and torchvision's recipes."""
Moment = Callable[[nn.Module, int], None]
"""Called with the student and the number of steps done."""


class Training(lightning.LightningModule):
    """The training step, the schedule and the evaluation of one run.

    Args:
        model: the student, perhaps with a distillation.
        settings: of the run.
        validation: the images to evaluate on.
        stream: the order of the training images; moved forward when a run is resumed.
        folder: gets metrics and checkpoints.
        observers: called before the first step and at every evaluation.
    """

    _distillation: Distillation | None

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        *,
        validation: Images,
        stream: Stream,
        folder: RunFolder,
        observers: Sequence[Moment] = (),
    ) -> None:
        super().__init__()
        self.model, self.settings, self.validation = model, settings, validation
        attached = getattr(model, "distillation", None)
        self.__dict__["_distillation"] = attached if isinstance(attached, Distillation) else None
        self.stream, self.folder, self.observers = stream, folder, observers
        self.evaluator = build_evaluator(validation)
        self.evaluated_at, self.found = -1, dict[str, float]()
        self.seconds, self._started = 0.0, perf_counter()
        self._warned: set[str] = set()

    # One step.

    def training_step(self, batch: tuple[list[Tensor], list[dict[str, Any]]], _: int) -> Tensor:
        """Return the sum of the student's and the distiller's losses."""
        attached = self._distillation
        if attached is not None:
            attached.iteration = self.global_step
        losses = self.model(*batch)
        when = f"iteration {self.global_step}"
        if attached is not None:
            attached.raise_if_not_finite(losses, when=when)
        elif terms := non_finite(losses):
            raise RunError(f"loss is not finite: {', '.join(terms)}", when, "lower {learning_rate}")
        if self._last_of(LOG_PERIOD):
            self._log_losses(losses)
        return torch.stack([loss.float() for loss in losses.values()]).sum()

    def _last_of(self, iterations: int) -> bool:
        attached = self._distillation
        return attached.last_of(iterations) if attached is not None else (self.global_step + 1) % iterations == 0

    def _log_losses(self, losses: dict[str, Tensor]) -> None:
        values = {name: float(loss.detach()) for name, loss in losses.items()}
        values = {"loss": sum(values.values()), **values}
        step, settings, attached = self.global_step + 1, self.settings, self._distillation
        self.folder.log(step, {"seconds": self.time(), **values})
        if attached is not None:
            self.folder.log(step, {f"distill/{name}": float(value) for name, value in attached.metrics().items()})
        if isinstance(self.logger, TensorBoardLogger):
            self.logger.log_metrics(values, step)
        parts = "  ".join(f"{name.removeprefix('loss_')} {value:.3g}" for name, value in values.items())
        logger.info("step %d/%d  %s  (%.0f s)", step, settings.iterations, parts, self.time())
        for place, warning in ({} if attached is None else attached.warnings(option)).items():
            if place not in self._warned:
                self._warned.add(place)
                logger.warning("%s", warning)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip, and stop before a bad gradient reaches the weights; float16's scaler skips such steps itself."""
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            clip_gradients(self, MAX_GRADIENT_NORM, when=f"iteration {self.global_step}")
        else:
            torch.nn.utils.clip_grad_norm_(self.parameters(), MAX_GRADIENT_NORM)

    def configure_optimizers(self) -> Any:
        """Build SGD or AdamW; a linear warm-up, then a cosine or a polynomial down to zero."""
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
            done = (step - warmup) / max(1, settings.iterations - warmup)
            return (1 - done) ** POWER if settings.schedule == "poly" else 0.5 * (1 + math.cos(math.pi * done))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Evaluation; every process has its share of the images.

    def on_train_start(self) -> None:
        """Observe the student as it starts."""
        self._started = perf_counter()
        if self.global_step == 0:
            self._observe(0)

    def validation_step(self, batch: tuple[list[Tensor], list[dict[str, Any]]], _: int) -> None:
        """Collect a batch's outputs."""
        images, targets = batch
        self.evaluator.add(self.model(images), targets)

    def on_validation_epoch_end(self) -> None:
        """Evaluate all processes' outputs."""
        shares = [self.evaluator.results]
        if self.trainer.world_size > 1:
            shares = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(shares, self.evaluator.results)
        self.evaluator.results = [result for share in shares for result in share]
        self.found = self.evaluator.metrics()
        if self.trainer.is_global_zero and not self.validation.semantic:
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
            part = self.folder.checkpoint.with_suffix(".part")  # Lightning's own way there is not always atomic
            self.trainer.save_checkpoint(part)
            if self.trainer.is_global_zero:
                os.replace(part, self.folder.checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the random state of the first process, what the method has learnt, and the time so far."""
        checkpoint["rng"] = torch.get_rng_state()
        if torch.cuda.is_available():
            checkpoint["rng_cuda"] = torch.cuda.get_rng_state()
        checkpoint["seconds"] = self.time()
        if self._distillation is not None:
            checkpoint["distiller"] = self._distillation.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resume at the same image, with the same random numbers."""
        _update(checkpoint)
        if self._distillation is not None:
            self._distillation.load_state_dict(checkpoint.get("distiller", {}))
        elif checkpoint.get("distiller"):
            raise RunError(
                "the checkpoint has a method's parameters, and this run has no method", "resuming",
                "resume with the same {method}, or start a new run from the student's weights",
            )  # fmt: skip
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

    def time(self) -> float:
        """Return seconds of training and evaluating so far, those before an interruption included."""
        return self.seconds + perf_counter() - self._started


def _update(checkpoint: dict[str, Any]) -> None:
    """Turn a checkpoint of version 0.1, where student and distiller were parts of one model, into today's."""
    state = checkpoint["state_dict"]
    if "distiller" in checkpoint or not any(name.startswith("model.student.") for name in state):
        return
    learnt = {name: value for name, value in state.items() if name.startswith("model.distiller.")}
    checkpoint["distiller"] = {name.removeprefix("model.distiller."): value for name, value in learnt.items()}
    checkpoint["state_dict"] = {
        name.replace("model.student.", "model.", 1): value for name, value in state.items() if name not in learnt
    }


def train(settings: Settings, output: str | Path, *, resume: bool = False, observers: Sequence[Moment] = ()) -> Any:
    """Train, evaluate, and leave the student in ``output``.

    Args:
        settings: of the run.
        output: folder; ``run.RunFolder`` lists what will be there.
        resume: resume what is in ``output``, from its last checkpoint; a finished run is left alone.
        observers: see ``Training``.

    Returns:
        The content of ``result.json``.

    Raises:
        ConfigError: something in settings, data or weights does not fit.
        RunError: a loss or gradient is not finite, or the folder cannot be used.
    """
    folder = RunFolder(output)
    folder.check(settings, resume=resume)
    if resume and (result := folder.result()) is not None:
        logger.info("%s is complete already", folder.path)
        return result
    asked, settings = settings, settings.resolved()
    if settings.crop and settings.size:
        raise ConfigError(
            "crop",
            settings.crop,
            f"none beside a size of {settings.size}, to which it would be resized",
            "choose one of {crop} and {size}",
        )
    model_name = settings.student_name
    training = load_data(settings.train_split, model_name, name="training data", crop=settings.crop)
    validation = load_data(settings.val_split, model_name, name="validation data")
    _check_classes(training, validation)
    settings = token_learning.ensure(settings, folder.path)
    lightning.seed_everything(settings.seed, verbose=False)
    model = build(settings, training)
    trainer = _trainer(settings, folder)
    stream = Stream(
        len(training),
        batch_size=settings.batch_size,
        batches=settings.iterations,
        seed=settings.seed,
        rank=trainer.global_rank,
        world=trainer.world_size,
    )
    task = Training(model, settings, validation=validation, stream=stream, folder=folder, observers=observers)
    loaders: tuple[DataLoader[Any], DataLoader[Any]] = (
        training_loader(training, stream, workers=settings.workers),
        _evaluation_loader(validation, settings, trainer),
    )
    folder.start(asked)
    try:
        trainer.fit(task, *loaders, ckpt_path=_checkpoint(folder) if resume else None, weights_only=False)
        if task.evaluated_at != settings.iterations:
            trainer.validate(task, loaders[1], verbose=False)
    except SystemExit:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from None
    if not trainer.is_global_zero:
        return None
    card = Card.of(settings, training)
    return folder.finish(card, plain(model), asked, metrics=task.found, seconds=task.time())


def _checkpoint(folder: RunFolder) -> Path | None:
    if not folder.checkpoint.is_file():
        return None
    if not zipfile.is_zipfile(folder.checkpoint):  # torch's format
        raise RunError("it is no checkpoint", str(folder.checkpoint), "delete it, and {resume} starts anew")
    return folder.checkpoint


def _check_classes(training: Images, validation: Images) -> None:
    if training.categories != validation.categories:
        raise ConfigError(
            "val_split", f"the categories {validation.categories}", f"those of the training data, {training.categories}"
        )


def _evaluation_loader(data: Images, settings: Settings, trainer: lightning.Trainer) -> DataLoader[Any]:
    world = trainer.world_size
    size = max(1, settings.batch_size // world)
    return evaluation_loader(data, batch_size=size, workers=settings.workers, rank=trainer.global_rank, world=world)


def _trainer(settings: Settings, folder: RunFolder) -> lightning.Trainer:
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        return _lightning(settings, folder)
    except (MisconfigurationException, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            "accelerator", reason, "what Lightning takes", "see {accelerator}, {devices}, {precision}"
        ) from error


def _lightning(settings: Settings, folder: RunFolder) -> lightning.Trainer:
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
