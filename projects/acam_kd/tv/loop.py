"""The loop of a run, with its checkpoints and its evaluations.

The loop is here, in sight; Lightning's Fabric has the devices, the processes and the precision. A Trainer in its place
would own the loop, and most of its features were switched off: it can neither save between a step and the evaluation
after it nor end a step before a signal ends the run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from time import perf_counter
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ..core import Distillation, RunError, clip_gradients
from ..core.average import Average
from ..core.interrupts import Interrupted, Signals
from ..core.outputs import non_finite
from ..core.teacher import evaluating
from ..report.confusion import draw_confusion
from ..report.samples import spread
from .best import Best
from .card import Card
from .checkpoint import Parts, restore_random
from .class_evaluation import ClassificationEvaluator
from .data import Images, Stream, evaluation_loader, training_loader
from .evaluation import Evaluator, build_evaluator
from .folder import RunFolder
from .hard import HardAugmentor
from .mixing import Mixing
from .models import plain
from .names import option
from .norms import enough_values
from .optimizer import build_optimizer, learning_rate_curve
from .pictures import draw, draw_masks
from .reports import Reports
from .run import Settings
from .unlabelled import Batch, UnlabelledBatches

__all__ = ["Moment", "Training"]

logger = logging.getLogger("acam_kd")

MAX_GRADIENT_NORM = 35.0
PICTURES = 8
"""The number of augmented images that are shown."""
Moment = Callable[[nn.Module, int], None]
"""Called with the student and the number of steps done."""


class Training:
    """The state of one run, its loop and its evaluations; every process has one.

    Args:
        fabric: launched.
        student: perhaps with a distillation.
        settings: of the run.
        training: the images to train on.
        validation: the images to evaluate on.
        stream: the order of the training images.
        folder: gets checkpoints and the student.
        signals: end the run between two steps.
        reports: get losses and metrics.
        observers: called before the first step and at every evaluation.
        unlabelled: the batches of the second loader.
        mixing: blends the images of a batch, and their labels.
    """

    def __init__(
        self,
        fabric: Fabric,
        student: nn.Module,
        settings: Settings,
        *,
        training: Images,
        validation: Images,
        stream: Stream,
        folder: RunFolder,
        signals: Signals,
        reports: Reports,
        observers: Sequence[Moment] = (),
        unlabelled: UnlabelledBatches | None = None,
        mixing: Mixing | None = None,
    ) -> None:
        self.fabric, self.student, self.settings = fabric, student, settings
        self.training, self.validation, self.stream = training, validation, stream
        self.folder, self.signals, self.reports, self.observers = folder, signals, reports, observers
        self.unlabelled, self.mixing = unlabelled, mixing
        attached = getattr(student, "distillation", None)
        self.attached = attached if isinstance(attached, Distillation) else None
        optimizer = build_optimizer(student, settings)
        self.schedule = LambdaLR(optimizer, learning_rate_curve(settings))
        self.model, self.optimizer = fabric.setup(student, optimizer)
        self.average, self.best = Average(student, settings.ema), Best(folder)
        self.hard: HardAugmentor | None = None
        if settings.augmentor and self.attached is not None:
            self.hard = HardAugmentor(fabric, student, self.attached, settings)  # type: ignore[arg-type]
        precision = fabric.strategy.precision
        self.parts = Parts(student, self.attached, optimizer, self.schedule, precision, self.average, self.hard)
        self.step, self.saved, self.evaluated = 0, -1, -1
        self.metrics = dict[str, float]()
        self.seconds, self._started = 0.0, perf_counter()

    @property
    def time(self) -> float:
        """Seconds of training and evaluating so far, those before an interruption included."""
        return self.seconds + perf_counter() - self._started

    def run(self, state: dict[str, Any] | None = None) -> None:
        """Train from the first step, or from the state of a checkpoint, to the last evaluation."""
        if state is not None:
            self._resume(state)
        if self.folder.first and (metrics := self.folder.rewind(self.step)):
            self.metrics, self.evaluated = metrics, self.step
            self.reports.known(self.step, metrics)
        self.reports.start(self.step)
        self._started = perf_counter()
        if self.step == 0:
            self._observe()
        self._evaluate_if_due()
        if state is not None:
            restore_random(state)
        with self.signals.together(self.fabric.world_size > 1):
            for batch, images in self._batches():
                with self.signals.step(), enough_values(f"iteration {self.step}"):
                    rate = float(self.schedule.get_last_lr()[0])
                    losses = self._train(batch, images)
                    self.reports.step(
                        self.step, losses, self.attached, seconds=self.time, rate=rate, augmentor=self.hard
                    )
                    if self.step % self.settings.checkpoint_period == 0 or self._evaluation_is_due():
                        self.save()
                self._stop_together()
                self._evaluate_if_due()

    def _batches(self) -> Iterator[tuple[Batch, list[Tensor]]]:
        """Yield each step's batch, and the images without labels beside it."""
        rank, world = self.fabric.global_rank, self.fabric.world_size
        self.stream.rank, self.stream.start = rank, self.step
        second = repeat(None) if self.unlabelled is None else self.unlabelled.along(self.step, rank=rank, world=world)
        loader = training_loader(self.training, self.stream, workers=self.settings.workers)
        for (images, targets), more in zip(loader, second):  # type: ignore[misc]
            if more is not None and self.unlabelled is not None and self.unlabelled.labelled:
                images, targets, more = images + more[0], targets + more[1], None
            yield self.fabric.to_device(((images, targets), [] if more is None else more[0]))

    def _train(self, batch: Batch, images: list[Tensor]) -> dict[str, Tensor]:
        """Make one step, and return the losses."""
        when = f"iteration {self.step}"
        if self.attached is not None:
            self.attached.iteration = self.step
        if self.mixing is not None:
            batch = self.mixing(*batch)
        losses: dict[str, Tensor] = self.model(*batch)
        if self.hard is not None:
            with self.fabric.autocast():
                losses = {**losses, **self.hard.losses(batch[0])}
        if images and self.unlabelled is not None and self.attached is not None:
            with self.fabric.autocast():
                losses = {**losses, **self.unlabelled.losses(self.student, self.attached, images)}
        self.optimizer.zero_grad()
        self.fabric.backward(torch.stack([loss.float() for loss in losses.values()]).sum())
        scaled = getattr(self.fabric.strategy.precision, "scaler", None) is not None
        explain = partial(self._check, losses, when)
        if not scaled:
            clip_gradients(self.student, MAX_GRADIENT_NORM, when=when, losses=losses.values(), explain=explain)
        else:  # float16's scaler skips a step whose gradients are not finite
            self.fabric.clip_gradients(self.model, self.optimizer, max_norm=MAX_GRADIENT_NORM, error_if_nonfinite=False)
        self.optimizer.step()
        if scaled:  # which has waited for the device by now
            explain()
        self.schedule.step()
        self.average.update()
        if self.hard is not None:
            with self.fabric.autocast():
                self.hard.step(batch[0], self.step)
        self.step += 1
        return losses

    def _check(self, losses: dict[str, Tensor], when: str) -> None:
        """Raise RunError for a loss that is not finite."""
        if self.attached is not None:
            self.attached.raise_if_not_finite(losses, when=when)
        elif terms := non_finite(losses):
            raise RunError(f"loss is not finite: {', '.join(terms)}", when, "lower {learning_rate}")

    # Evaluation; every process has its share of the images.

    def _evaluation_is_due(self) -> bool:
        at_end = self.step == self.settings.iterations
        return self.step > 0 and self.step != self.evaluated and (at_end or self.step % self.settings.eval_period == 0)

    def _evaluate_if_due(self) -> None:
        if self.step == self.settings.iterations:  # before the final evaluation, which may fail
            with self.average.applied():
                self.folder.write_student(Card.of(self.settings, self.training, self.student), plain(self.student))
        if self.fabric.broadcast(self._evaluation_is_due()):  # the first process knows what is in metrics.jsonl
            with self.signals.together(False), self.average.applied():
                self._evaluate()
            self.reports.progress.start()

    def _evaluate(self) -> None:
        settings, rank, world = self.settings, self.fabric.global_rank, self.fabric.world_size
        size = max(1, settings.batch_size // world)
        loader = evaluation_loader(self.validation, batch_size=size, workers=settings.workers, rank=rank, world=world)
        evaluator = build_evaluator(self.validation)
        with torch.no_grad(), evaluating(self.student), self.fabric.autocast():
            for number, (images, targets) in enumerate(loader):
                evaluator.add(self.student(self.fabric.to_device(images)), targets)
                done = min((number + 1) * size * world, len(self.validation))
                self.reports.evaluating(self.step, done, len(self.validation))
        if world > 1:
            shares: list[Any] = [None] * world
            torch.distributed.all_gather_object(shares, evaluator.results)
            evaluator.results = [result for share in shares for result in share]
        self.evaluated = self.step
        if self.fabric.is_global_zero:
            self.metrics = evaluator.metrics()
            if not self.validation.semantic:
                self.folder.write_predictions(evaluator.results)
            self._draw(evaluator)
            self._observe()
            self.best.offer(plain(self.student), self.step, self.metrics)
            self.reports.metrics(self.step, self.metrics)

    def _draw(self, evaluator: Evaluator) -> None:
        """Draw predictions, masks, a classifier's confusions, and what an augmentor makes of training images."""
        with self.fabric.autocast():
            self.reports.picture(self.step, draw(self.student, self.validation, self.fabric.device))
            if (masks := draw_masks(self.student, self.validation, self.fabric.device)) is not None:
                self.reports.picture(self.step, masks, name="masks")
        if isinstance(evaluator, ClassificationEvaluator):
            self.folder.write("confusion.png", draw_confusion(evaluator.confusion(), [*evaluator.categories.values()]))
        if self.hard is not None:
            images = [self.training[index][0] for index in spread(len(self.training), PICTURES)]
            shown = self.hard.picture(self.fabric.to_device(images))
            self.reports.picture(self.step, shown, name="augmented")

    def _observe(self) -> None:
        if self.fabric.is_global_zero:
            for observer in self.observers:
                observer(self.student, self.step)

    # Checkpoints and the end.

    def save(self) -> None:
        """Write the checkpoint of the steps done so far; the first process alone does, without the others' help."""
        self.folder.write_checkpoint(self.parts.state(step=self.step, seconds=self.time))
        self.saved = self.step

    def _resume(self, state: dict[str, Any]) -> None:
        self.parts.load(state, self.folder.checkpoint)
        self.step = self.saved = state["global_step"]
        self.seconds = state["seconds"]
        logger.info("resuming after step %d of %d", self.step, self.settings.iterations)

    def _stop_together(self) -> None:
        """End all processes after the same step, once one of them received a signal."""
        if self.fabric.world_size > 1:
            received = torch.tensor(self.signals.received, device=self.fabric.device)
            number = int(self.fabric.all_reduce(received, reduce_op="max"))  # type: ignore[arg-type]
            if number:
                self.save()
                self.fabric.barrier()
                self.signals.stop(number)

    @contextmanager
    def saving_what_is_done(self) -> Iterator[None]:
        """Save the steps done when the run ends early, and say so; a step that failed is not among them."""
        try:
            yield
        except BaseException as error:
            if self.step > max(self.saved, 0) and not self.signals.within_step:
                try:
                    self.save()
                except RunError as failure:  # as on a full disk, which may be what ended the run
                    logger.warning("step %d is not saved: %s", self.step, failure.render(option))
            kept = ""
            if self.saved >= 0:
                kept = f"{self.folder.checkpoint} holds step {self.saved} of {self.settings.iterations}"
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted.of(error, kept) from None
            if kept:
                logger.info("%s", kept)
            raise
