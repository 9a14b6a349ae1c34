"""Everything that a run says while it runs: metrics.jsonl, TensorBoard, pictures, the log and the progress line."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import TracebackType

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..core import Distillation
from ..core.unlabelled import PREFIX
from ..report.panels import Array
from ..report.progress import Progress
from .folder import RunFolder
from .hard import LOSS, HardAugmentor
from .loggers import Loggers
from .names import option
from .pictures import to_jpeg
from .run import Settings
from .written import as_dict

__all__ = ["Reports"]

logger = logging.getLogger("acam_kd")

LOG_PERIOD = 20
BOARD = "tensorboard"
STILL, LONG = 1e-3, 100
"""The part of a loss within which it stays, and the number of steps after which that is reported."""
ADDED = (PREFIX, LOSS)
"""The beginnings of the names of losses that the engine adds to the model's own."""


class Reports:
    """The reports of one process; only the first one writes.

    Args:
        folder: of the run.
        settings: of the run.
    """

    def __init__(self, folder: RunFolder, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        more = settings.unlabelled_batch if settings.unlabelled else 0
        self.progress = Progress(settings.iterations, settings.batch_size, unlabelled=more, shown=folder.first)
        self._board: SummaryWriter | None = None
        self._loggers: Loggers | None = None
        self._warned: set[str] = set()
        self._still: dict[str, tuple[float, int]] = {}  # the loss's name -> its value, and since which step

    def __enter__(self) -> Reports:
        self.progress.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.progress.__exit__()
        if self._loggers is not None:
            self._loggers.close(failed=error is not None)
        if self._board is not None:
            try:
                self._board.close()
            except OSError as failure:  # as on a full disk, which may be the error that ends the run
                logger.warning("%s cannot be written: %s", self.folder.path / BOARD, failure.strerror or failure)

    def start(self, step: int) -> None:
        """Open TensorBoard's file; what an interrupted run wrote after this step is hidden."""
        if self.folder.first:
            with self.folder.writing(BOARD):
                self._board = SummaryWriter(str(self.folder.path / BOARD), purge_step=step + 1)
            self._loggers = Loggers(self.settings.logger, self.folder.path, as_dict(self.settings))
        self.progress.start()

    def step(
        self,
        step: int,
        losses: Mapping[str, Tensor],
        attached: Distillation | None,
        *,
        seconds: float,
        rate: float,
        augmentor: HardAugmentor | None = None,
    ) -> None:
        """Report the losses of a step, if it is one to report.

        Args:
            step: the number of steps done.
            losses: of the step.
            attached: the student's distillation.
            seconds: since the run began.
            rate: the learning rate.
            augmentor: of the run.
        """
        self.progress.count()
        distilling = attached if attached is not None and not attached.weighting.ended(attached.iteration) else None
        regular = step % LOG_PERIOD == 0
        last = distilling.last_of(LOG_PERIOD) if distilling is not None else regular
        logged = last or step == self.settings.iterations
        shown = logged or self.progress.due()
        if not shown and not regular:
            return
        values = {name: float(loss.detach()) for name, loss in losses.items()}
        if regular:
            added = () if attached is None else attached.returned.losses
            task = {name: x for name, x in values.items() if name not in added and not name.startswith(ADDED)}
            self._warn(self._stuck(step, task))
        if not shown:
            return
        values = {"loss": sum(values.values()), **values}
        text = self.progress.text(step, values, rate=rate)
        if logged:
            self.folder.log(step, {"seconds": seconds, **values})
            if distilling is not None:
                measured = {f"distill/{name}": float(value) for name, value in distilling.metrics().items()}
                self.folder.log(step, {**measured, **(augmentor.metrics() if augmentor is not None else {})})
            self._scalars({**values, "lr": rate}, step)
            if not self.progress.live:
                logger.info("%s", text)
            self._warn({} if attached is None else attached.warnings(option))
        self.progress.draw(text)

    def _warn(self, warnings: Mapping[str, str]) -> None:
        for place, warning in warnings.items():
            if place not in self._warned:
                self._warned.add(place)
                logger.warning("%s", warning)

    def _stuck(self, step: int, task: Mapping[str, float]) -> dict[str, str]:
        """Return a warning for each of the task's losses that has stayed where it is."""
        warnings = {}
        for name, value in task.items():
            first, since = self._still.get(name, (value, step))
            if value == 0 or not abs(value - first) <= STILL * abs(first):
                first, since = value, step
            self._still[name] = first, since
            if step - since >= LONG:
                warnings[name] = (
                    f"{name} has stayed at {value:.4g} for {step - since} steps: it seems that nothing trains it. A "
                    "detector's box head that ends in a ReLU, as torchvision's FCOS has it, may have died; lower "
                    f"{option('learning_rate')}, lengthen {option('warmup')}, or choose another {option('seed')}"
                )
        return warnings

    def evaluating(self, step: int, done: int, total: int) -> None:
        """Show how far an evaluation is."""
        if self.progress.due():
            self.progress.draw(f"step {step}/{self.settings.iterations}  evaluating: {done}/{total} images")

    def metrics(self, step: int, found: Mapping[str, float]) -> None:
        """Report an evaluation; its line in metrics.jsonl is what marks it as done."""
        self._scalars(found, step)
        self.folder.log(step, found)
        shown = "  ".join(f"{name} {value:.2f}" for name, value in found.items())
        logger.info("step %d/%d  %s", step, self.settings.iterations, shown)
        self.known(step, found)

    def known(self, step: int, found: Mapping[str, float]) -> None:
        """Show the first metric of an evaluation in the line from now on."""
        name, value = next(iter(found.items()))
        self.progress.metrics = f"{name} {value:.2f} at {step}"

    def picture(self, step: int, picture: Array, name: str = "validation") -> None:
        """Write a picture into the folder and to TensorBoard; those of validation images have no name there."""
        prefix = "" if name == "validation" else f"{name}_"
        self.folder.write(f"pictures/{prefix}step_{step}.jpg", to_jpeg(picture))
        if self._board is not None:
            with self.folder.writing(BOARD):
                self._board.add_image(name, picture, step, dataformats="HWC")

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        if self._loggers is not None:
            self._loggers.scalars(values, step)
        if self._board is not None:
            with self.folder.writing(BOARD):
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
